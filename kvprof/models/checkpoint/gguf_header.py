"""The header of a GGUF file, walked within its bounds before any library reads it.

Reads sizes, names and offsets; keeps no value but single numbers and short texts. The libraries trust these numbers: a
length that the file does not have keeps them looping for hours, or fills the memory.
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
TOKENS = "tokenizer.ggml.tokens"
STAND_IN = 2

STRING, ARRAY = 8, 9
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


@dataclass(frozen=True)
class GGUFField:
    """A field as the header has it. start_byte, stop_byte: of its key, type and value, within the file.

    value: a single number or text; None of an array, and of a text longer than LONGEST_NAME_BYTES. length: an array's
    elements, else None.
    """

    start_byte: int
    stop_byte: int
    value: int | float | str | None
    length: int | None


@dataclass(frozen=True)
class GGUFHeader:
    """What a file's header says. first_byte: of the tensors' data. infos_byte: of their descriptions."""

    fields: dict[str, GGUFField]
    tensors: dict[str, GGUFTensor]
    infos_byte: int
    infos_stop_byte: int
    first_byte: int
    alignment: int
    order: str

    @property
    def architecture(self) -> str | None:
        """What llama.cpp calls the kind of model."""
        field = self.fields.get("general.architecture")
        return field.value if field is not None and isinstance(field.value, str) else None

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the vocabulary has; None where there is none."""
        field = self.fields.get(TOKENS)
        return None if field is None else field.length


def need_gguf() -> None:
    """Raise ModelError, saying what to install, where the package that reads GGUF files is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError(
            "reading a .gguf file needs the package gguf.\n  Install it: pip install 'kvprof-bits[gguf]'"
        ) from None


def check_gguf(path: Path) -> GGUFHeader:
    """Return what a file's header says; raises ModelError, saying what is wrong, where it is not sound."""
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


def read_gguf_header(content: bytes | mmap.mmap) -> GGUFHeader:
    """Return what a file's bytes describe; raises ValueError where they are no whole GGUF file."""
    reader = _Reader(content)
    tensor_count, field_count = reader.counts()
    fields: dict[str, GGUFField] = {}
    alignment = 32
    for _ in range(field_count):
        start = reader.at
        name = reader.text(LONGEST_NAME_BYTES)
        if name in fields:
            raise ValueError(f"the key {name[:60]!r} stands twice")
        kind = reader.number("I")
        value, length = reader.value(kind)
        fields[name] = GGUFField(start, reader.at, value, length)
        if name.endswith(_COUNTS) and isinstance(value, int) and not 0 <= value <= MOST_LAYERS:
            raise ValueError(f"{name[:60]} is {value}, more than {MOST_LAYERS}")
        if name == "general.alignment":
            if kind != 4 or not isinstance(value, int) or value <= 0 or value & (value - 1):
                raise ValueError("general.alignment is no power of two")
            alignment = value
    infos_byte = reader.at
    described = [reader.tensor() for _ in range(tensor_count)]
    infos_stop_byte = reader.at
    first_byte = -(-infos_stop_byte // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset, size in described:
        if name in tensors:
            raise ValueError(f"the tensor {name[:60]!r} stands twice")
        if offset % alignment or first_byte + offset + size > reader.length:
            raise ValueError(f"{name[:60]!r} lies at byte {first_byte + offset}, {size} bytes of {reader.length}")
        tensors[name] = GGUFTensor(shape, kind, first_byte + offset, first_byte + offset + size)
    return GGUFHeader(fields, tensors, infos_byte, infos_stop_byte, first_byte, alignment, reader.order)


class _Reader:
    """Reads on from where it is, never past the end of the file."""

    def __init__(self, content: bytes | mmap.mmap) -> None:
        self._content, self.length, self.at = content, len(content), 0
        self.order, self._elements = "<", 0
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version % 2**16 == 0:  # written on a machine of the other byte order
            self.order = ">"
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

    def value(self, kind: int) -> tuple[int | float | str | None, int | None]:
        """Read a single number or a short text, and pass over any other value; of an array, return its length too."""
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind]), None
        start = self.at
        self._skip(kind)
        if kind == STRING:
            text = self._content[start + 8 : self.at]
            return (text.decode(errors="replace") if len(text) <= LONGEST_NAME_BYTES else None), None
        return None, int(struct.unpack_from(self.order + "Q", self._content, start + 4)[0])

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
        if kind == STRING:
            self._pass(self.number("Q"))
            return
        if kind != ARRAY or level == MOST_LEVELS:
            raise ValueError(f"a value of type {kind} at byte {self.at}")
        of, length = self.number("I"), self.number("Q")
        self._elements += length
        if self._elements > MOST_ELEMENTS:
            raise ValueError(f"arrays of {self._elements} elements at byte {self.at}; {MOST_ELEMENTS} at most")
        if of in _SCALARS:
            self._pass(length * struct.calcsize("<" + _SCALARS[of]))
            return
        if of == STRING:
            self._pass_strings(length)
            return
        for _ in range(length):
            self._skip(of, level + 1)

    def _pass_strings(self, count: int) -> None:
        """Pass over the texts of an array: a vocabulary has hundreds of thousands, so that this loop counts."""
        at, end, content = self.at, self.length - 8, self._content
        unpack = struct.Struct(self.order + "Q").unpack_from
        for _ in range(count):
            if at > end:
                break
            at += 8 + unpack(content, at)[0]
        else:
            self._pass(at - self.at)
            return
        self.at = min(at, self.length)
        self._pass(8)  # says what is missing

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
        layout = self.order + form
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
