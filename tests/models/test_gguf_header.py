"""The walk over a GGUF header: what llama.cpp's writer writes is read as its reader reads it; no lie is believed."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from test_gguf import write_gguf
from tiny import tiny_model
from typer.testing import CliRunner

from kvprof.cli.app import app
from kvprof.errors import ModelError
from kvprof.models.checkpoint.gguf_header import check_gguf, read_gguf_header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    *fields: bytes, tensors: tuple[bytes, ...] = (), data: bytes = b"", counts: tuple[int, int] | None = None
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(fields)))) + b"".join(fields + tensors)
    return head + b"\0" * (-len(head) % 32) + data


ARCHITECTURE = field("general.architecture", 8, text("llama"))


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_0])
@pytest.mark.parametrize("endianess", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_tensors_are_where_the_library_finds_them(tmp_path: Path, kind: Type, endianess: gguf.GGUFEndian) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=endianess)
    writer.add_block_count(2)
    writer.add_token_list(["a", "é", ""])
    writer.add_array("scores", [1.5, -2.0])
    writer.add_bool("flag", True)
    for name, rows in (("x", 3), ("y", 5)):
        content = np.arange(rows * 64, dtype=np.float32).reshape(rows, 64)
        writer.add_tensor(name, gguf.quants.quantize(content, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = check_gguf(tmp_path / "a.gguf").tensors
    expected = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    assert {name: (one.shape, one.start_byte, one.stop_byte - one.start_byte) for name, one in found.items()} == {
        one.name: (tuple(one.shape.tolist()), one.data_offset, one.n_bytes) for one in expected
    }


LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "no magic": (b"GGML" + b"\0" * 60, "does not begin with GGUF"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "version 99": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
    "ends in the counts": (b"GGUF" + struct.pack("<IQ", 3, 0), "missing"),
    "2^63 tensors": (file(counts=(2**63, 0)), "tensors and 0 fields"),
    "2^63 fields": (file(counts=(0, 2**63)), "0 tensors and"),
    "a long key": (file(struct.pack("<Q", 2**62) + b"a" * 60), "a name of"),
    "a key past the end": (file(struct.pack("<Q", 60_000) + b"a" * 60), "missing"),
    "a key that is no text": (file(struct.pack("<Q", 2) + b"\xff\xff" + b"\0" * 60), "no UTF-8"),
    "a string past the end": (file(field("a", 8, struct.pack("<Q", 2**63))), "missing"),
    "a value of no type": (file(field("a", 13, b"\0" * 40)), "type 13"),
    "an array past the end": (file(field("a", 9, array(4, 2**20))), "missing"),
    "an array of 2^62": (file(field("a", 9, array(4, 2**62))), "at most"),
    "an array of no type": (file(field("a", 9, array(77, 3, b"\0" * 40))), "type 77"),
    "strings that are not there": (file(field("a", 9, array(8, 2**22))), "missing"),
    "arrays in arrays": (file(field("a", 9, array(9, 1) * 50)), "type 9"),
    "a billion empty arrays": (
        file(field("a", 9, array(9, 2**20, array(9, 2**20, array(4, 0) * 64)))),
        "missing|at most",
    ),
    "a key twice": (file(ARCHITECTURE, ARCHITECTURE), "stands twice"),
    "a billion layers": (file(field("llama.block_count", 4, struct.pack("<I", 10**9))), "block_count is 1000000000"),
    "fewer than no layers": (file(field("llama.block_count", 5, struct.pack("<i", -1))), "block_count is -1"),
    "a billion experts": (file(field("llama.expert_count", 4, struct.pack("<I", 10**9))), "expert_count"),
    "alignment 0": (file(field("general.alignment", 4, struct.pack("<I", 0))), "power of two"),
    "alignment 33": (file(field("general.alignment", 4, struct.pack("<I", 33))), "power of two"),
    "alignment of a wrong type": (file(field("general.alignment", 8, text("32"))), "power of two"),
    "a tensor past the end": (file(tensors=(tensor("x", (8,)),), data=b"\0" * 31), "lies at byte"),
    "a tensor far past the end": (file(tensors=(tensor("x", (8,), offset=2**63),), data=b"\0" * 64), "lies at byte"),
    "a tensor off its place": (file(tensors=(tensor("x", (4,), offset=1),), data=b"\0" * 64), "lies at byte"),
    "2^64 elements": (file(tensors=(tensor("x", (2**32, 2**32)),), data=b"\0" * 64), "lies at byte"),
    "elements that overflow": (file(tensors=(tensor("x", (2**63, 2**63, 2, 2)),), data=b"\0" * 64), "lies at byte"),
    "no elements": (file(tensors=(tensor("x", (0, 2**63)),), data=b"\0" * 64), "has a shape"),
    "too many dimensions": (file(tensors=(tensor("x", (1,) * 5),), data=b"\0" * 64), "5 dimensions"),
    "2^32 - 1 dimensions": (file(tensors=(text("x") + b"\xff" * 40,)), "dimensions"),
    "half a block": (file(tensors=(tensor("x", (33,), kind=2),), data=b"\0" * 64), "blocks of 32"),
    "a type of no name": (file(tensors=(tensor("x", (4,), kind=4),), data=b"\0" * 64), "type 4"),
    "a tensor twice": (file(tensors=(tensor("x", (4,)),) * 2, data=b"\0" * 64), "stands twice"),
}


@pytest.mark.parametrize("name", LIES)
def test_no_lie_is_believed(tmp_path: Path, name: str) -> None:
    content, words = LIES[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=rf"not a readable GGUF file(.|\n)*({words})") as caught:
            check_gguf(path)
        assert len(str(caught.value)) < 2_000
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["an array of 2^62", "2^63 fields", "arrays in arrays", "a billion layers"])
@pytest.mark.parametrize("command", ["inspect", "norms"])
def test_a_lie_is_one_message_of_a_command(in_tmp: Path, command: str, name: str) -> None:
    Path("a.gguf").write_bytes(LIES[name][0])
    result = CliRunner().invoke(app, [command, "a.gguf"])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert "not a readable GGUF file" in " ".join(result.output.split())


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "a.gguf", tiny_model("llama")).read_bytes()
    read_gguf_header(content)
    last = max(one.stop_byte for one in read_gguf_header(content).tensors.values())
    for size in [*range(0, 2_000, 7), *range(2_000, last, 9_001), last - 1]:
        with pytest.raises(ValueError, match=r"missing|lies at byte|begin|fields in|shape"):
            read_gguf_header(content[:size])


def damaged(content: bytes, position: int, byte: int) -> bytes:
    return content[:position] + bytes([byte]) + content[position + 1 :]


@pytest.mark.parametrize("byte", [0, 1, 8, 9, 127, 255])
def test_what_passes_with_a_byte_changed_the_library_can_read(tmp_path: Path, byte: int) -> None:
    """A bound that the walk keeps is one that the library needs: it ends, and raises nothing that is not caught."""
    content = file(
        ARCHITECTURE,
        field("tokens", 9, array(8, 2, text("a") + text("b"))),
        tensors=(tensor("x", (4,)),),
        data=b"\0" * 32,
    )
    read: Callable[[Path], object] = gguf.GGUFReader
    passed = 0
    for position in range(len(content) - 32):
        changed = damaged(content, position, byte)
        try:
            read_gguf_header(changed)
        except ValueError:
            continue
        passed += 1
        (tmp_path / "a.gguf").write_bytes(changed)
        read(tmp_path / "a.gguf")
    assert passed > 0
