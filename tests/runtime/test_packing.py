"""Codes in bytes: as many as the bits fill, and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprof.records.formats import CODE_BITS
from kvprof.runtime.quantization.packing import PLANES, pack, packed_bytes, unpack

widths = st.sampled_from(CODE_BITS)
counts = st.integers(0, 200)


def random_codes(shape: tuple[int, ...], bits: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8))


@settings(deadline=None)
@given(bits=widths, count=counts, rows=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_codes_come_back_from_exactly_the_bytes_that_their_bits_fill(
    bits: int, count: int, rows: int, seed: int
) -> None:
    codes = random_codes((rows, 2, count), bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, 2, math.ceil(count * bits / 8))
    assert packed_bytes(count, bits) == packed.shape[-1]
    assert torch.equal(unpack(packed, bits, count), codes)


@settings(deadline=None)
@given(bits=widths, count=counts, seed=st.integers(0, 2**32))
def test_every_set_bit_of_a_code_is_one_set_bit_of_the_bytes(bits: int, count: int, seed: int) -> None:
    codes = random_codes((count,), bits, seed)
    packed = pack(codes, bits)
    assert np.unpackbits(packed.numpy()).sum() == np.unpackbits(codes.numpy()).sum()
    spare = packed.numel() * 8 - count * bits
    assert 0 <= spare < 8
    if spare:  # in the last byte, at its top, and empty
        assert int(packed[-1]) < 2 ** (8 - spare)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_each_bit_of_each_code_has_a_place_of_its_own(bits: int) -> None:
    count = 19
    places = set()
    for position in range(count):
        for bit in range(bits):
            codes = torch.zeros(count, dtype=torch.uint8)
            codes[position] = 1 << bit
            (place,) = np.flatnonzero(np.unpackbits(pack(codes, bits).numpy()))
            places.add(int(place))
    assert len(places) == count * bits


@pytest.mark.parametrize("bits", CODE_BITS)
def test_planes_cover_every_bit_once_and_divide_a_byte(bits: int) -> None:
    covered = [place + bit for width, place in PLANES[bits] for bit in range(width)]
    assert sorted(covered) == list(range(bits))
    assert all(8 % width == 0 for width, _ in PLANES[bits])


@settings(max_examples=50, deadline=None)
@given(bits=widths, count=counts, seed=st.integers(0, 2**32))
def test_codes_may_lie_anywhere_in_memory(bits: int, count: int, seed: int) -> None:
    codes = random_codes((count, 3, 2), bits, seed).permute(2, 1, 0)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack(codes.contiguous(), bits))
    strided = packed.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(unpack(strided, bits, count), codes)


def test_packing_does_not_write_to_the_codes() -> None:
    codes = random_codes((64,), 3, 0)
    before = codes.clone()
    unpack(pack(codes, 3), 3, 64)
    pack(codes[:61], 3)
    assert torch.equal(codes, before)
