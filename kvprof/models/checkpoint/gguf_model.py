"""A language model in one GGUF file, or in the parts that llama-gguf-split makes: whole, or refused.

Reads headers. Of several parts the first alone has the metadata, and each has tensors of its own. The libraries take a
quarter of a minute over a large vocabulary, so that one file without it is written for those who need none.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvprof.errors import ModelError
from kvprof.models.checkpoint.gguf_header import (
    ARRAY,
    STAND_IN,
    STRING,
    TOKENS,
    GGUFField,
    GGUFHeader,
    GGUFTensor,
    check_gguf,
    need_gguf,
)

_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.ASCII)
"""What llama-gguf-split calls a part; llama.cpp finds the others by it."""

_SPLIT = "split."
_MODEL = "model"
"""What general.type says of a model; adapters, projectors and matrices of importance say something else."""
_NEEDED = ("block_count", "context_length", "embedding_length")
_NEEDED_TO_ATTEND = (
    ("attention.head_count",),
    ("feed_forward_length", "expert_feed_forward_length"),
    ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
"""Of each, one at least: what transformers completes by a default of its own where it is missing."""


@dataclass(frozen=True)
class GGUFModel:
    """The files that make a model, and their headers in the same order."""

    paths: tuple[Path, ...]
    headers: tuple[GGUFHeader, ...]

    @property
    def fields(self) -> dict[str, GGUFField]:
        """The metadata, without what says that there are parts."""
        return {name: field for name, field in self.headers[0].fields.items() if not name.startswith(_SPLIT)}

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the kind of model."""
        found = self.headers[0].architecture
        assert found is not None
        return found

    @property
    def tensors(self) -> dict[str, tuple[Path, GGUFTensor]]:
        """Each tensor with the file that it is in."""
        files = zip(self.paths, self.headers, strict=True)
        return {name: (path, tensor) for path, header in files for name, tensor in header.tensors.items()}

    @property
    def file_bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.paths)


def first_part(path: Path) -> Path:
    """Return the part that a model's metadata are in, of whichever part; of a file that is no part, itself.

    Goes by the file's name alone. Raises ModelError where that part is missing.
    """
    match = _PART.match(path.name)
    if match is None:
        return path
    first = path.with_name(_name(match, 1))
    if not first.is_file():
        raise _missing(path, match, [1])
    return first


def models_in(folder: Path) -> list[Path]:
    """Return the GGUF models of a folder, the first part of each; projectors of images, which go with one, left out."""
    files = sorted(file for file in folder.glob("*.gguf") if not file.name.startswith("mmproj"))
    return list(dict.fromkeys(first_part(file) for file in files))


def open_gguf(path: Path) -> GGUFModel:
    """Return the headers of a GGUF model. path: its file, or its first part.

    Raises ModelError for a file that is not sound, a part that is missing or of another model, for what is no language
    model, and for metadata that lack what a config is made from.
    """
    need_gguf()
    header = check_gguf(path)
    count = _number(header, "split.count")
    paths = (path,) if count is None or count <= 1 else _parts(path, count)
    headers = (header, *map(check_gguf, paths[1:]))
    model = GGUFModel(paths, headers)
    if len(paths) > 1:
        _check_parts(model)
    _check_language_model(path, model)
    return model


def write_without_vocabulary(model: GGUFModel, copy: Path, weights: bool) -> None:
    """Write a model anew into one file, without the arrays of its tokenizer: all that a config and weights follow from.

    Of the vocabulary STAND_IN empty tokens are left: who counts them finds a number that is no vocabulary's.
    weights: copy the tensors too; else each is there by name alone, as a single number.
    """
    header, tensors = model.headers[0], model.tensors
    order, alignment = header.order, header.alignment
    texts = {TOKENS} & model.fields.keys()
    kept = [field for name, field in model.fields.items() if field.length is None or not name.startswith("tokenizer.")]
    with open(model.paths[0], "rb") as source, open(copy, "wb") as out:
        out.write(source.read(8))  # magic and version
        out.write(struct.pack(order + "QQ", len(tensors), len(kept) + len(texts)))
        for name in texts:
            out.write(struct.pack(order + "Q", len(name)) + name.encode())
            out.write(struct.pack(order + "IIQ", ARRAY, STRING, STAND_IN) + bytes(8 * STAND_IN))
        for field in kept:
            source.seek(field.start_byte)
            out.write(source.read(field.stop_byte - field.start_byte))
        offset = 0
        for name, (_, tensor) in tensors.items():
            shape, kind = (tensor.shape, tensor.type) if weights else ((1,), 0)  # one float32, at the first byte
            encoded = name.encode()
            out.write(struct.pack(order + "Q", len(encoded)) + encoded)
            out.write(struct.pack(f"{order}I{len(shape)}QIQ", len(shape), *shape, kind, offset))
            offset += _aligned(tensor.stop_byte - tensor.start_byte, alignment) if weights else 0
        out.write(bytes(-out.tell() % alignment))
        if not weights:
            out.write(bytes(alignment))
            return
        for path in model.paths:
            with open(path, "rb") as part:
                for where, tensor in tensors.values():
                    if where == path:
                        _copy(part, tensor, out)
                        out.write(bytes(-out.tell() % alignment))


def _copy(source: BinaryIO, tensor: GGUFTensor, out: BinaryIO) -> None:
    source.seek(tensor.start_byte)
    left = tensor.stop_byte - tensor.start_byte
    while left:
        content = source.read(min(left, 2**20))
        if not content:
            raise OSError("a GGUF file became shorter while it was read")
        out.write(content)
        left -= len(content)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _parts(path: Path, count: int) -> tuple[Path, ...]:
    """Return the files of a model in parts; raises ModelError where one is missing, or where they cannot be told."""
    match = _PART.match(path.name)
    if match is None or int(match["count"]) != count:
        raise ModelError(
            f"{path} is one of {count} parts by its metadata, but is not called so.\n"
            f"  Call the parts NAME-00001-of-{count:05d}.gguf and so on, or join them: llama-gguf-split --merge"
        )
    missing = [number for number in range(1, count + 1) if not path.with_name(_name(match, number)).is_file()]
    if missing:
        raise _missing(path, match, missing)
    return tuple(path.with_name(_name(match, number)) for number in range(1, count + 1))


def _missing(path: Path, match: re.Match[str], numbers: list[int]) -> ModelError:
    also = f", and {len(numbers) - 1} more of them" if len(numbers) > 1 else ""
    return ModelError(
        f"part {numbers[0]} of {int(match['count'])} of a GGUF model is missing: {_name(match, numbers[0])}{also}.\n"
        f"  Download it into {path.parent}, beside the others."
    )


def _name(match: re.Match[str], number: int) -> str:
    return f"{match['stem']}-{number:05d}-of-{match['count']}.gguf"


def _check_parts(model: GGUFModel) -> None:
    """Raise ModelError for parts that are not of one model."""
    first = model.headers[0]
    for number, (path, header) in enumerate(zip(model.paths, model.headers, strict=True)):
        own = _number(header, "split.no"), _number(header, "split.count")
        if own != (number, len(model.paths)) or (header.order, header.alignment) != (first.order, first.alignment):
            raise ModelError(
                f"{path} is not part {number + 1} of {len(model.paths)} by its own metadata.\n"
                "  The parts are of different models, or of two versions: download them again."
            )
    held, told = sum(len(header.tensors) for header in model.headers), _number(first, "split.tensors.count")
    if len(model.tensors) != held or (told is not None and told != held):
        raise ModelError(
            f"the parts of {model.paths[0]} hold {len(model.tensors)} tensors; their metadata say {told or held}.\n"
            "  They are of different models, or of two versions: download them again."
        )


def _check_language_model(path: Path, model: GGUFModel) -> None:
    """Raise ModelError for what is no language model, and for one whose config would have to be made up."""
    fields = model.headers[0].fields
    kind = fields.get("general.type")
    if kind is not None and kind.value != _MODEL:
        based = next((fields[name].value for name in _BASES if name in fields), None)
        base = f" of {based}" if kind.value == "adapter" and based else ""
        raise ModelError(
            f"{path} holds no language model: its general.type is {kind.value!r}{base}.\n"
            "  Name the GGUF file of the model that it belongs to."
        )
    architecture = model.headers[0].architecture
    if architecture is None:
        raise ModelError(f"{path} is not a readable GGUF file: it has no general.architecture.")
    if architecture == "clip":
        raise ModelError(
            f"{path} holds no language model, but the image or audio encoder of one (architecture clip).\n"
            "  Name the GGUF file of the model that it belongs to."
        )
    needed: list[tuple[str, ...]] = [(name,) for name in _NEEDED]
    if any(".attn_k." in name or ".attn_qkv." in name for header in model.headers for name in header.tensors):
        needed += _NEEDED_TO_ATTEND
    wanted = [tuple(f"{architecture}.{name}" for name in names) for names in needed]
    wanted.append((f"{architecture}.vocab_size", TOKENS))
    if lacking := [" or ".join(names) for names in wanted if not fields.keys() & set(names)]:
        raise ModelError(
            f"{path} does not say what model it holds: its metadata lack {', '.join(lacking)}.\n"
            "  Convert it again (convert_hf_to_gguf.py of llama.cpp), or name the checkpoint that it was made from."
        )


_BASES = ("general.base_model.0.repo_url", "general.base_model.0.name", "general.basename")


def _number(header: GGUFHeader, name: str) -> int | None:
    field = header.fields.get(name)
    return field.value if field is not None and type(field.value) is int else None
