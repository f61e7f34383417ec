"""What formats the kernels take, and what of a format and its pages they are told.

Reads formats and packed blocks; launches nothing. Does not know layers, nor what is done with the codes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvprof.records.formats import Format
from kvprof.runtime.history import PAGE_TOKENS, CodeBlock, StoredTensor
from kvprof.runtime.kernels.triton_kernels.arithmetic import CHANNEL, FULL, ROTATED, TOKEN
from kvprof.runtime.quantization.rotation import exact_levels, level_edges, rotation_signs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(form: Format, head_dim: int, dtype: torch.dtype) -> str | None:
    """Return why the kernels do not take keys or values in a format, or None where they do."""
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not among float16, bfloat16 and float32"
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"heads of {head_dim} channels are not of 16 to 256, a multiple of 8"
    if form.is_full or (form.axis == "token" and form.group_size >= head_dim):
        return None
    if form.group_size % 16:
        return f"groups of {form.group_size} are no multiple of 16"
    return f"groups of {form.group_size} are of more than 256 tokens" if form.group_size > 256 else None


def read_in_words(form: Format, head_dim: int) -> bool:
    """Whether codes are read in words of 32 bits: rows and groups must be of powers of two that are large enough."""
    group = min(form.group_size, head_dim) if form.axis == "token" else head_dim
    powers = next_power(head_dim) == head_dim and next_power(group) == group
    return not form.is_full and powers and head_dim >= 32 and group >= head_dim // 8


class Pages:
    """A tensor's pages and the rest behind them, as kernels are given them."""

    def __init__(self, stored: StoredTensor, device: torch.device) -> None:
        blocks: Sequence[Tensor | CodeBlock] = stored.recent if stored.form.is_full else stored.coded
        if stored.form.is_full:
            page, held = PAGE_TOKENS, stored.recent[-1].shape[2]
        else:
            page, held = page_tokens(stored.form), stored.coded[-1].units * stored.unit_tokens if stored.coded else 0
        pages = len(blocks) if held in (0, page) else len(blocks) - 1
        assert held <= page
        if not blocks:
            names = ("uint8", stored.quantizer.scale_dtype, stored.quantizer.zero_dtype)
            rest = tuple(_nothing(getattr(torch, name), device) for name in names)
        else:
            last = blocks[-1]
            rest = (last,) if isinstance(last, Tensor) else last.tensors
        codes, scale, zero = (rest[min(index, len(rest) - 1)] for index in range(3))
        table = stored.addresses.of(blocks, pages, device)
        self.arguments = (table, pages, codes, scale, zero, held % page)


def page_tokens(form: Format) -> int:
    """Return the tokens of a page of codes."""
    unit = form.unit_tokens
    return ceil_div(PAGE_TOKENS, unit) * unit


def scheme_of(form: Format) -> Any:
    """Return how a tensor is held, as the kernels call it."""
    if form.is_full:
        return FULL
    if form.scheme == "rotated":
        return ROTATED
    return CHANNEL if form.axis == "channel" else TOKEN


@functools.cache
def magnitudes_of(form: Format, head_dim: int) -> tuple[int, ...]:
    """Return what a rotated format's positive levels, in half precision, are sums of: one number a set of bits.

    The level at place i is, in its bits, the sum over the sets of bits that are within i.
    """
    if form.scheme != "rotated" or form.bits > 4:
        return (0,)
    half = 2 ** (form.bits - 1)
    levels = exact_levels(form.bits, head_dim)[half:].to(torch.float16).view(torch.int16).tolist()
    return tuple(
        sum((-1) ** (i ^ part).bit_count() * levels[part] for part in range(half) if part & i == part)
        for i in range(half)
    )


@functools.lru_cache(maxsize=64)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what stands for a tensor that is not there: of the type that kernels are compiled for all the same."""
    return torch.empty(16, dtype=dtype, device=device)


@functools.lru_cache(maxsize=256)
def rotated_tables(
    bits: int, head_dim: int, seed: int, device: torch.device, used: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rotation's signs, the edges between levels in float64, and the levels in float32."""
    if not used:
        return (_nothing(torch.float32, device),) * 3
    signs = rotation_signs(head_dim, seed).to(device=device, dtype=torch.float32)
    levels = exact_levels(bits, head_dim).to(device=device, dtype=torch.float32)
    return signs, level_edges(bits).to(device), levels


def on_device_of(tensor: Tensor) -> Any:
    """Return a context in which kernels are launched on a tensor's device."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)  # -1: where there is none, nothing changes


def next_power(count: int) -> int:
    """Return the smallest power of two that is no smaller."""
    return 1 << (count - 1).bit_length()


def ceil_div(count: int, size: int) -> int:
    """Return how many of a size hold a count."""
    return -(-count // size)
