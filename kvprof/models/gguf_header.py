"""The header of a GGUF file, walked within its bounds before any library reads it.

Reads sizes, names and offsets; keeps no value but the few that say how large a model is. The libraries trust these
numbers: a length that the file does not have keeps them looping for hours, or fills the memory.
Format: docs/gguf.md of ggml-org/ggml
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from kvprof.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
LONGEST_NAME_BYTES = 65_535
MOST_ELEMENTS = 2**23
"""Of all arrays together: the largest vocabulary and its merges are a million."""
MOST_LEVELS = 4
"""Of arrays in arrays; nobody writes two."""
MOST_LAYERS = 10_000
"""Or experts in one: a file of kvprof's counts no further, and building them would not end."""

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""The value types of fixed length, as struct has them."""
_LEAST_FIELD_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8
_COUNTS = (".block_count", ".expert_count")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the header describes it. shape: innermost dimension first; start_byte: within the file."""

    shape: tuple[int, ...]
    type: int
    start_byte: int
    stop_byte: int


def check_gguf(path: Path) -> dict[str, GGUFTensor]:
    """Return the tensors of a file, by name; raises ModelError, saying what is wrong, where its header is not sound."""
    try:
        with open(path, "rb") as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise ValueError("it is empty") from None
            with contextlib.closing(mapped):
                return read_gguf_header(mapped)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}.\n  Download it again.") from None


def read_gguf_header(content: bytes | mmap.mmap) -> dict[str, GGUFTensor]:
    """Return the tensors that a file's bytes describe; raises ValueError where they are no whole GGUF file."""
    reader = _Reader(content)
    tensor_count, field_count = reader.counts()
    names: set[str] = set()
    alignment = 32
    for _ in range(field_count):
        name = reader.text(LONGEST_NAME_BYTES)
        if name in names:
            raise ValueError(f"the key {name[:60]!r} stands twice")
        names.add(name)
        kind = reader.number("I")
        value = reader.value(kind)
        if name.endswith(_COUNTS) and value is not None and not 0 <= value <= MOST_LAYERS:
            raise ValueError(f"{name[:60]} is {value}, more than {MOST_LAYERS}")
        if name == "general.alignment":
            if kind != 4 or value is None or value <= 0 or value & (value - 1):
                raise ValueError("general.alignment is no power of two")
            alignment = value
    described = [reader.tensor() for _ in range(tensor_count)]
    first_byte = -(-reader.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset, size in described:
        if name in tensors:
            raise ValueError(f"the tensor {name[:60]!r} stands twice")
        if offset % alignment or first_byte + offset + size > reader.length:
            raise ValueError(f"{name[:60]!r} lies at byte {first_byte + offset}, {size} bytes of {reader.length}")
        tensors[name] = GGUFTensor(shape, kind, first_byte + offset, first_byte + offset + size)
    return tensors


class _Reader:
    """Reads on from where it is, never past the end of the file."""

    def __init__(self, content: bytes | mmap.mmap) -> None:
        self._content, self.length, self.at = content, len(content), 0
        self._order, self._elements = "<", 0
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version % 2**16 == 0:  # written on a machine of the other byte order
            self._order = ">"
            self.at -= 4
            version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} of the format is not one of {', '.join(map(str, VERSIONS))}")

    def counts(self) -> tuple[int, int]:
        """Read how many tensors and how many fields there are."""
        tensors, fields = self.number("Q"), self.number("Q")
        if tensors * _LEAST_TENSOR_BYTES + fields * _LEAST_FIELD_BYTES > self.length - self.at:
            raise ValueError(f"{tensors} tensors and {fields} fields in {self.length} bytes")
        return tensors, fields

    def number(self, form: str) -> int:
        """Read a whole number, of struct's format."""
        return int(self._unpack(form))

    def value(self, kind: int) -> int | None:
        """Read a value if that is a whole number, and pass over any other."""
        if kind in _SCALARS:
            number = self._unpack(_SCALARS[kind])
            return number if isinstance(number, int) else None
        self._skip(kind)
        return None

    def text(self, longest: int) -> str:
        """Read a name."""
        length = self.number("Q")
        if length > longest:
            raise ValueError(f"a name of {length} bytes at byte {self.at}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise ValueError(f"a name that is no UTF-8 before byte {self.at}") from None

    def _skip(self, kind: int, level: int = 0) -> None:
        """Pass over a string or an array."""
        if kind == _STRING:
            self._pass(self.number("Q"))
            return
        if kind != _ARRAY or level == MOST_LEVELS:
            raise ValueError(f"a value of type {kind} at byte {self.at}")
        of, length = self.number("I"), self.number("Q")
        self._elements += length
        if self._elements > MOST_ELEMENTS:
            raise ValueError(f"arrays of {self._elements} elements at byte {self.at}; {MOST_ELEMENTS} at most")
        if of in _SCALARS:
            self._pass(length * struct.calcsize("<" + _SCALARS[of]))
            return
        for _ in range(length):
            self._skip(of, level + 1)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int, int]:
        """Read a tensor's name, shape, type, offset and bytes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self.text(LONGEST_NAME_BYTES), self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name[:60]!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind, offset = self.number("I"), self.number("Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ValueError(f"{name[:60]!r} is of type {kind}, which is not known") from None
        elements = 1
        for size in shape:
            elements *= size
        if elements == 0 or (shape or (1,))[0] % block:
            raise ValueError(f"{name[:60]!r} has a shape of {'x'.join(map(str, shape))}, in blocks of {block}")
        return name, shape, kind, offset, elements // block * block_bytes

    def _unpack(self, form: str) -> int | float:
        layout = self._order + form
        value: int | float = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _take(self, count: int) -> bytes:
        start = self.at
        self._pass(count)
        return self._content[start : self.at]

    def _pass(self, count: int) -> None:
        if count > self.length - self.at:
            raise ValueError(f"it ends at byte {self.length}, {count} bytes are missing from byte {self.at} on")
        self.at += count
