"""The kernels that quantize and pack, and that unpack: the very bits of `torch_kernels`.

Device code of Triton's; `packing` beside this file launches it. Does not know layers, nor when a token is quantized.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvprof.runtime.kernels.triton_kernels.arithmetic import (
    CHANNEL,
    ROTATED,
    codes_of,
    hadamard,
    limited,
    rounded_to,
    scale_and_zero,
)
from kvprof.runtime.kernels.triton_kernels.codes import HIGH_BITS, LOW_BITS, column_channels, load_codes, open_page


@triton.jit(do_not_specialize=["tokens"])
def pack_groups(
    x,
    codes,
    scale,
    zero,
    tokens,
    heads,
    stride_b,
    stride_h,
    stride_t,
    D: tl.constexpr,
    ALL: tl.constexpr,
    GROUP: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BITS: tl.constexpr,
    FRACTIONS: tl.constexpr,
    SCALE_MAX: tl.constexpr,
    ZERO_MAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize (B, H, T, D) and pack it. FRACTIONS: what `clip` tries besides the whole range.

    A program has one group of tokens, or some tokens: ROWS of them, or fewer. It first finds scales and zeros, COLUMNS
    channels at a time, then reads the numbers again as the bytes want them, eight or fewer channels to a byte.
    """
    bh = tl.program_id(0).to(tl.int64)
    SPAN: tl.constexpr = GROUP if BY_CHANNEL else ROWS
    row = tl.arange(0, ROWS)
    token = tl.program_id(1) * SPAN + row
    valid = (row < SPAN) & (token < tokens)
    x_at = x + (bh // heads) * stride_b + (bh % heads) * stride_h + token.to(tl.int64) * stride_t
    if BY_CHANNEL:
        unit = (bh * (tokens // GROUP) + tl.program_id(1)) * D
    else:
        unit = ((bh * tokens + token) * ((D + GROUP - 1) // GROUP))[:, None]
    SCALE: tl.constexpr = scale.dtype.element_ty
    ZERO: tl.constexpr = zero.dtype.element_ty
    TOP: tl.constexpr = 2**BITS - 1.0
    ALONG: tl.constexpr = 0 if BY_CHANNEL else 1
    WIDE: tl.constexpr = COLUMNS if BY_CHANNEL else GROUP
    column = tl.arange(0, COLUMNS)
    for part in range((D + WIDE - 1) // WIDE):
        channel = part * WIDE + column
        known = (column < WIDE) & (channel < D)
        inside = valid[:, None] & known[None, :]
        numbers = tl.load(x_at[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        low = tl.min(tl.where(inside, numbers, float("inf")), ALONG, keep_dims=True) + 0.0  # as `quantizer` does
        high = tl.max(tl.where(inside, numbers, float("-inf")), ALONG, keep_dims=True)
        broken = tl.max((numbers != numbers).to(tl.int32), ALONG, keep_dims=True) > 0
        broken = broken | (low == float("-inf")) | (high == float("inf"))
        low, high = tl.where(broken, float("nan"), low), tl.where(broken, float("nan"), high)
        best_scale, best_zero = scale_and_zero(low, high, TOP, SCALE, SCALE_MAX, ZERO, ZERO_MAX)
        if len(FRACTIONS) > 0:
            middle, reach = (low + high) / 2, (high - low) / 2
            least = _squared_error(numbers, inside, best_scale, best_zero, TOP, ALONG)
            for i in tl.static_range(len(FRACTIONS)):
                away = reach * FRACTIONS[i]
                new_scale, new_zero = scale_and_zero(
                    middle - away, middle + away, TOP, SCALE, SCALE_MAX, ZERO, ZERO_MAX
                )
                error = _squared_error(numbers, inside, new_scale, new_zero, TOP, ALONG)
                better = error < least
                best_scale = tl.where(better, new_scale, best_scale)
                best_zero = tl.where(better, new_zero, best_zero)
                least = tl.where(better, error, least)
        if BY_CHANNEL:
            place, stored = unit + channel[None, :], known[None, :]
        else:
            place, stored = unit + part, valid[:, None]
        tl.store(scale + place, best_scale, mask=stored)
        tl.store(zero + place, best_zero, mask=stored)
    tl.debug_barrier()  # what one thread stored another now reads

    rows = codes + (bh * tokens + token) * (D * BITS // 8)
    LOW: tl.constexpr = LOW_BITS[BITS]
    HIGH: tl.constexpr = HIGH_BITS[BITS]
    _pack_plane(x_at, rows, scale, zero, unit, valid, D, ALL, GROUP, BY_CHANNEL, TOP, 0, LOW)
    if HIGH > 0:
        rows += D * LOW // 8
        _pack_plane(x_at, rows, scale, zero, unit, valid, D, ALL, GROUP, BY_CHANNEL, TOP, LOW, HIGH)


@triton.jit
def _pack_plane(
    x_at,
    rows,
    scale,
    zero,
    unit,
    valid,
    D: tl.constexpr,
    ALL: tl.constexpr,
    GROUP: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    TOP: tl.constexpr,
    PLACE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the bits PLACE to PLACE + WIDTH of the codes of whole rows."""
    BYTES: tl.constexpr = D * WIDTH // 8
    byte = tl.arange(0, ALL * WIDTH // 8)
    inside = valid[:, None] & (byte < BYTES)[None, :]
    packed = tl.zeros(inside.shape, tl.int32)
    for slot in tl.static_range(8 // WIDTH):
        channel = slot * BYTES + byte
        numbers = tl.load(x_at[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        if BY_CHANNEL:
            place = tl.broadcast_to(unit + channel[None, :], inside.shape)
        else:
            place = unit + (channel // GROUP)[None, :]
        codes = codes_of(
            numbers, tl.load(scale + place, mask=inside, other=0.0), tl.load(zero + place, mask=inside, other=0.0), TOP
        )
        packed |= ((codes.to(tl.int32) >> PLACE) & (2**WIDTH - 1)) << (slot * WIDTH)
    tl.store(rows[:, None] + byte[None, :], packed.to(tl.uint8), mask=inside)


@triton.jit
def _squared_error(numbers, inside, scale, zero, TOP: tl.constexpr, ALONG: tl.constexpr):
    away = codes_of(numbers, scale, zero, TOP) * scale.to(tl.float32) + zero.to(tl.float32) - numbers
    away = tl.where(inside, away, 0.0).to(tl.float64)
    return tl.sum(away * away, ALONG, keep_dims=True)


@triton.jit(do_not_specialize=["tokens"])
def pack_rotated(
    x,
    signs,
    edges,
    codes,
    scale,
    tokens,
    heads,
    stride_b,
    stride_h,
    stride_t,
    ROOT_D: tl.constexpr,
    LOG_D: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_MAX: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rotate (B, H, T, D), quantize and pack it; signs: (D,) and edges: between the levels, float64."""
    D: tl.constexpr = 2**LOG_D
    bh = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    valid = token < tokens
    place = x + (bh // heads) * stride_b + (bh % heads) * stride_h
    place += token.to(tl.int64)[:, None] * stride_t + column[None, :]
    numbers = tl.load(place, mask=valid[:, None], other=0.0).to(tl.float64) * tl.load(signs + column)[None, :]
    root = tl.full((1, 1), ROOT_D, tl.float64)
    y = hadamard(numbers, LOG_D) / root
    size = tl.sqrt(tl.sum(y * y, 1, keep_dims=True) / D)
    size = tl.where(size == float("inf"), float("nan"), size)
    stored = rounded_to(limited(size, -SCALE_MAX, SCALE_MAX).to(tl.float32), scale.dtype.element_ty)
    step = stored.to(tl.float64)
    y = y / tl.where(step == 0, 1.0, step)
    found = tl.zeros(y.shape, tl.int32)  # how many edges lie below, by halving
    for i in tl.static_range(BITS):
        half = 2 ** (BITS - 1 - i)
        found = tl.where(y > tl.load(edges + found + (half - 1)), found + half, found)
    tl.store(scale + bh * tokens + token[:, None], stored, mask=valid[:, None])
    rows = codes + (bh * tokens + token) * (D * BITS // 8)
    LOW: tl.constexpr = LOW_BITS[BITS]
    HIGH: tl.constexpr = HIGH_BITS[BITS]
    _store_plane(rows, found, valid, 0, LOW)
    if HIGH > 0:
        _store_plane(rows + D * LOW // 8, found, valid, LOW, HIGH)


@triton.jit
def _store_plane(rows, codes, valid, PLACE: tl.constexpr, WIDTH: tl.constexpr):
    """Write the bits PLACE to PLACE + WIDTH of codes (N, D), int32, D a power of two."""
    SLOTS: tl.constexpr = 8 // WIDTH
    BYTES: tl.constexpr = codes.shape[1] // SLOTS
    part = tl.reshape((codes >> PLACE) & (2**WIDTH - 1), (codes.shape[0], SLOTS, BYTES))
    packed = tl.sum(part << (tl.arange(0, SLOTS) * WIDTH)[None, :, None], 1)
    place = rows[:, None] + tl.arange(0, BYTES)[None, :]
    tl.store(place, packed.to(tl.uint8), mask=valid[:, None])


@triton.jit(do_not_specialize=["pages", "rest_tokens"])
def unpack_rows(
    table,
    pages,
    rest_codes,
    rest_scale,
    rest_zero,
    rest_tokens,
    signs,
    levels,
    out,
    heads,
    stride_b,
    stride_h,
    stride_t,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    LOG_D: tl.constexpr,
    ROOT_D: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
    OUT_MAX: tl.constexpr,
):
    """Write what codes stand for into (B, H, T, D). A program has N tokens of a page and WIDE channels, PADDED."""
    bh = tl.program_id(0).to(tl.int64)
    TILES: tl.constexpr = (PAGE + N - 1) // N
    page = tl.program_id(1) // TILES
    stored = (table, pages, rest_codes, rest_scale, rest_zero, rest_tokens)
    codes_at, scale_at, zero_at, tokens = open_page(stored, page, bh, SCHEME, BITS, GROUP, D, PAGE)
    row = (tl.program_id(1) % TILES) * N + tl.arange(0, N)
    known = tl.minimum(row, tokens - 1)
    for g in tl.static_range((D + WIDE - 1) // WIDE):
        channel, inside = column_channels(D, g * WIDE, WIDE, PADDED, False)
        codes = load_codes(codes_at + known * (D * BITS // 8), channel, inside, D, BITS)
        if SCHEME == ROTATED:
            y = hadamard(tl.load(levels + codes.to(tl.int32)), LOG_D) * tl.load(signs + channel)[None, :]
            scale = tl.load(scale_at + known).to(tl.float32)
            numbers = y * tl.div_rn(scale, tl.full(scale.shape, ROOT_D, tl.float32))[:, None]
        else:
            if SCHEME == CHANNEL:
                place = (known // GROUP)[:, None] * D + tl.minimum(channel, D - 1)[None, :]
            else:
                place = (known * ((D + GROUP - 1) // GROUP) + g)[:, None]
            numbers = codes.to(tl.float32) * tl.load(scale_at + place).to(tl.float32)
            numbers = numbers + tl.load(zero_at + place).to(tl.float32)
        token = (page * PAGE + row).to(tl.int64)
        place = out + (bh // heads) * stride_b + (bh % heads) * stride_h
        place += token[:, None] * stride_t + channel[None, :]
        there = (row < tokens)[:, None] & inside[None, :]
        if tl.float32 != out.dtype.element_ty:
            numbers = limited(numbers, -OUT_MAX, OUT_MAX)
        tl.store(place, rounded_to(numbers, out.dtype.element_ty), mask=there)
