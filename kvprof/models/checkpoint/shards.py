"""What safetensors files say of themselves: which of them make a checkpoint, and which tensors a header names.

Works on file names, the text of an index and the bytes of a header, wherever they come from; never on weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from kvprof.errors import ModelError
from kvprof.records.document import read_at_most

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"

LENGTH_BYTES = 8
"""A file begins with the length of its header, little-endian."""
_LONGEST_HEADER_BYTES = 100_000_000  # of the safetensors library too
_LARGEST_INDEX_BYTES = 2**26  # of the largest models, ten million
_MOST_DIMENSIONS = 16

DTYPES = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1", 4),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
}
"""By the name in a header: torch's name, where torch has one, and the bits of an element."""
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
"""Dtypes of plain weights; float8 is not among them: its scales stand elsewhere."""

BEFORE_QUANTIZED = "Name the checkpoint that it was quantized from: its weights are what is measured."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it. dtype: torch's name. start_byte, stop_byte: where it lies in its file."""

    shape: tuple[int, ...]
    dtype: str
    start_byte: int
    stop_byte: int


@dataclass(frozen=True)
class Shards:
    """The files that make a checkpoint. promised: which tensor is in which of them, where an index says so."""

    files: tuple[str, ...]
    promised: dict[str, str]
    where: str

    def places(self, headers: Iterable[Mapping[str, StoredTensor]]) -> dict[str, tuple[str, StoredTensor]]:
        """Return each tensor with the file that it is in. headers: of `files`, in their order.

        Raises ModelError for a tensor that stands in two files, and for one that the index promises and no file has.
        """
        found: dict[str, tuple[str, StoredTensor]] = {}
        for shard, header in zip(self.files, headers, strict=True):
            for name, tensor in header.items():
                if name in found:
                    raise ModelError(
                        f"{_short(name)} in {self.where} stands twice, in {found[name][0]} and in {shard}.\n"
                        "  The shards are of two different models, or of two versions: download them again."
                    )
                found[name] = shard, tensor
        for name, shard in self.promised.items():
            if name not in found or found[name][0] != shard:
                raise ModelError(
                    f"{SAFETENSORS_INDEX} in {self.where} says that {_short(name)} is in {shard}, but it is not.\n"
                    "  The index and the shards are of two different models, or of two versions: download both again."
                )
        return found


def find_shards(names: Collection[str], read_index: Callable[[], str], where: str) -> Shards:
    """Choose among the files of a folder or a repository: the whole file, else the index's shards, else any shards.

    names: of the files there. read_index: called where the index is among them and counts. Raises ModelError for an
    index that is none, or that names a shard which is missing, outside its folder or no safetensors file.
    """
    if SAFETENSORS in names:
        return Shards((SAFETENSORS,), {}, where)
    alone = tuple(sorted(name for name in names if name.endswith(".safetensors")))
    if SAFETENSORS_INDEX not in names:
        return Shards(alone, {}, where)
    try:
        promised = json.loads(read_index())["weight_map"]
        shards = sorted(set(promised.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise ModelError(
            f"{SAFETENSORS_INDEX} in {where} is not an index of safetensors shards.\n  Download it again."
        ) from None
    for shard in shards:
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or shard in ("", "..") or "\\" in shard:
            raise ModelError(
                f"{SAFETENSORS_INDEX} in {where} names the shard {_short(str(shard))!r}, which is outside its folder."
            )
        if not shard.endswith(".safetensors"):
            raise ModelError(
                f"{SAFETENSORS_INDEX} in {where} names the shard {_short(shard)!r}, which is no safetensors file: "
                "it is not opened.\n  Convert it once, where you trust it: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
            )
        if shard not in names:
            raise ModelError(
                f"{SAFETENSORS_INDEX} in {where} names the shard {_short(shard)}, but it is not there.\n"
                "  Finish the download."
            )
    return Shards(tuple(shards) or alone, dict(promised), where)


def read_index(path: Path) -> str:
    """Return the text of an index on the disk; raises ValueError where it is too long to be one, or no text."""
    raw = read_at_most(path, _LARGEST_INDEX_BYTES)
    if raw is None:
        raise ValueError("too long")
    return raw.decode()


def quantized(name: str, dtype: str) -> ModelError:
    """Return what to say of a weight whose numbers are codes."""
    return ModelError(f"{_short(name)} is quantized to {dtype}.\n  {BEFORE_QUANTIZED}")


def header_bytes(prefix: bytes, file_bytes: int) -> int:
    """Return how long a file's header is, from the first 8 of its bytes; raises ValueError where it cannot be so."""
    if len(prefix) < LENGTH_BYTES:
        raise ValueError("it is too short to have a header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > min(_LONGEST_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {file_bytes}")
    return length


def parse_header(header: bytes, file_bytes: int) -> dict[str, StoredTensor]:
    """Return the tensors that a header names; raises ValueError where it is none, or not that of a file this long.

    header: as long as `header_bytes` says. As the format demands, the tensors fill the rest of the file without gaps.
    """
    try:
        entries = json.loads(header.decode())
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    first_byte = LENGTH_BYTES + len(header)
    tensors = {name: _stored(name, entry, first_byte) for name, entry in entries.items() if name != "__metadata__"}
    end = first_byte
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start_byte, item[1].stop_byte)):
        if tensor.start_byte != end:
            raise ValueError(f"{_short(name)} does not begin where the tensor before it ends")
        end = tensor.stop_byte
    if end != file_bytes:
        raise ValueError(f"its tensors end at byte {end}, the file at {file_bytes}")
    return tensors


def _stored(name: str, entry: object, first_byte: int) -> StoredTensor:
    """Check one entry of a header."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{_short(name)} has no dtype that is known")
    dtype, bits = DTYPES[entry["dtype"]]
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{_short(name)} has no shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{_short(name)} has no place in the file")
    start, stop = offsets
    if 8 * (stop - start) != math.prod(shape) * bits:
        raise ValueError(f"{_short(name)} has {stop - start} bytes, which its shape does not fill")
    return StoredTensor(tuple(shape), dtype, first_byte + start, first_byte + stop)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of whole numbers that a file could count by; true is not 1."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _short(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "..."
