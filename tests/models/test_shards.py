"""A safetensors header read by our own code, against the library's reading of the same bytes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from kvprof.models.checkpoint.shards import DTYPES, LENGTH_BYTES, find_shards, header_bytes, parse_header

TENSORS = {
    "a": torch.zeros(3, 2),
    "b": torch.zeros(5, dtype=torch.bfloat16),
    "c": torch.zeros(0, 4),
    "d": torch.ones(()),
}
FILE = save(TENSORS, metadata={"format": "pt"})


def read_header(content: bytes) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Names, shapes and places of a file's tensors; raises ValueError."""
    stop = LENGTH_BYTES + header_bytes(content[:LENGTH_BYTES], len(content))
    found = parse_header(content[LENGTH_BYTES:stop], len(content))
    return {name: (tensor.shape, tensor.start_byte, tensor.stop_byte) for name, tensor in found.items()}


def test_a_header_says_where_every_tensor_lies() -> None:
    found = read_header(FILE)
    assert found.keys() == TENSORS.keys()
    for name, (shape, start, stop) in found.items():
        assert shape == tuple(TENSORS[name].shape)
        assert FILE[start:stop] == TENSORS[name].view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if hasattr(torch, DTYPES[dtype][0])])
def test_every_dtype_is_the_one_that_the_library_means_and_as_long(dtype: str) -> None:
    name, bits = DTYPES[dtype]
    tensor = torch.zeros(16, dtype=getattr(torch, name))
    assert tensor.itemsize * 8 == bits
    content = save({"x": tensor})
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["x"]["dtype"] == dtype
    assert read_header(content)["x"][0] == (16,)


@settings(max_examples=600, deadline=None)
@given(position=st.integers(0, len(FILE) - 1), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_a_file_with_a_byte_changed_or_an_end_cut_is_read_as_the_library_reads_it(
    position: int, byte: int, cut: int
) -> None:
    content = bytearray(FILE)
    content[position] = byte
    damaged = bytes(content[: len(content) - max(0, cut - 30)])
    try:
        expected = {name: (tuple(entry["shape"]), len(entry["data"])) for name, entry in deserialize(damaged)}
    except SafetensorError:
        expected = None
    try:
        ours = {name: (shape, stop - start) for name, (shape, start, stop) in read_header(damaged).items()}
    except ValueError:
        ours = None
    assert ours == expected


@settings(max_examples=300, deadline=None)
@given(header=st.binary(max_size=60), more=st.integers(0, 2**70))
def test_no_bytes_are_more_than_a_value_error(header: bytes, more: int) -> None:
    try:
        read_header(len(header).to_bytes(8, "little") + header)
        parse_header(header, more)
    except ValueError:
        pass


def test_a_folder_s_whole_file_counts_before_an_index_and_an_index_before_other_shards() -> None:
    names = ["b.safetensors", "a.safetensors", "config.json"]
    index = json.dumps({"weight_map": {"x": "b.safetensors"}})
    assert find_shards(names, lambda: pytest.fail("no index"), "here").files == ("a.safetensors", "b.safetensors")
    names.append("model.safetensors.index.json")
    assert find_shards(names, lambda: index, "here").files == ("b.safetensors",)
    names.append("model.safetensors")
    assert find_shards(names, lambda: pytest.fail("the whole file counts"), "here").files == ("model.safetensors",)
