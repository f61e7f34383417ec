"""Scales over a matrix: one for all of it, for each row, for groups of columns, or for blocks of both; 4-bit floats.

Works on tensors. Does not know where they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of E2M1, by code (OCP Microscaling Formats, section 5.3.3)."""

SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
"""Of FP8 scales; bytes are exponents of two."""

_EXPONENT_BIAS = 127


def block_of(
    shape: tuple[int, int], scales: tuple[int, ...], stated: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Return the (rows, columns) that share a scale; None where the scales do not lie over the matrix.

    shape: of the matrix. scales: the shape that they have: one number, one a row, or a grid over rows and columns.
    stated: the block that the config names, whose last ones may be cut off by the edge of the matrix.
    """
    rows, columns = shape
    if scales in ((), (1,), (1, 1)):
        return rows, columns
    if len(scales) == 1:
        scales = (scales[0], 1)
    if len(scales) != 2 or 0 in scales:
        return None
    if stated is not None and scales == (-(-rows // stated[0]), -(-columns // stated[1])):
        return stated
    if rows % scales[0] or columns % scales[1]:
        return None
    return rows // scales[0], columns // scales[1]


def scaled(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return codes times their scales, in the scales' dtype. codes: (rows, columns). block: of `block_of`."""
    rows, columns = codes.shape
    grid = scales.reshape(-(-rows // block[0]), -(-columns // block[1]))
    by_column = grid.repeat_interleave(block[1], dim=1)[:, :columns] if grid.shape[1] > 1 else grid
    if block[0] == 1 or len(grid) == 1:
        return codes.to(scales.dtype) * by_column
    result = torch.empty(codes.shape, dtype=scales.dtype)
    for index, start in enumerate(range(0, rows, block[0])):
        stop = min(rows, start + block[0])
        torch.mul(codes[start:stop].to(scales.dtype), by_column[index], out=result[start:stop])
    return result


def exponents(stored: Tensor) -> Tensor:
    """Return what bytes mean as E8M0 scales: powers of two, bfloat16, which holds each of them."""
    return torch.pow(2.0, (stored.to(torch.int32) - _EXPONENT_BIAS).to(torch.bfloat16))


def float_scales(stored: Tensor) -> Tensor:
    """Return scales as float32, of whichever of SCALE_DTYPES."""
    return exponents(stored).float() if stored.dtype == torch.uint8 else stored.float()


def unpacked_float4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of 4-bit floats, two a byte, the first in the low bits. packed: (rows, bytes), uint8."""
    table = torch.tensor(FLOAT4, dtype=dtype)
    pairs = torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(packed.shape[0], -1)
    return table[pairs.int()]


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes that lie in rows of 32-bit words without gaps, the first in the low bits. int32, (rows, count).

    words: (rows, at least count * bits / 32 words), int32 or uint32. A code may begin in one word and end in the next.
    """
    starts = torch.arange(count) * bits
    word, offset = starts // 32, (starts % 32).int()
    signed = words.view(torch.int32) if words.dtype == torch.uint32 else words
    mask = (1 << bits) - 1
    codes = (signed[:, word] >> offset) & torch.where(offset > 32 - bits, (1 << (32 - offset)) - 1, mask)
    if bits & (bits - 1):
        over = (starts % 32 + bits > 32).nonzero()[:, 0]
        codes[:, over] |= (signed[:, word[over] + 1] << (32 - offset[over])) & mask
    return codes
