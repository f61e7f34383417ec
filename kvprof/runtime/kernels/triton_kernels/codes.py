"""Packed bytes -> codes -> numbers, in a GPU's registers. `runtime.quantization.packing` says how codes lie in bytes.

Device functions of Triton's. Where rows and groups are powers of two, codes are read in words of 32 bits: a shift and a
mask leave two of them 16 bits apart, which is how a GPU holds a pair of half-precision numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvprof.runtime.kernels.triton_kernels.arithmetic import CHANNEL, ROTATED, TOKEN
from kvprof.runtime.quantization.packing import PLANES

LOW_BITS = tl.constexpr(tuple(PLANES[bits][0][0] if bits in PLANES else 0 for bits in range(9)))
HIGH_BITS = tl.constexpr(tuple(bits - low for bits, low in enumerate(LOW_BITS.value)))
"""Of codes of each width, the bits in their first plane, and in their second; 0 where there is none."""

PAGE_COLUMNS = tl.constexpr(3)
"""Addresses of one page in the table: of its codes, scales and zeros."""


@triton.jit
def _plane_codes(rows, channel, inside, BYTES: tl.constexpr, WIDTH: tl.constexpr):
    """Return what a plane of BYTES bytes holds of codes (N, C); rows: where it begins for each token, (N,)."""
    packed = tl.load(rows[:, None] + (channel % BYTES)[None, :], mask=inside[None, :], other=0)
    return (packed >> ((channel // BYTES) * WIDTH).to(tl.uint8)[None, :]) & (2**WIDTH - 1)


@triton.jit
def load_codes(rows, channel, inside, D: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of any channels, (N, C), uint8; rows: where the bytes of each token begin, (N,)."""
    LOW: tl.constexpr = LOW_BITS[BITS]
    HIGH: tl.constexpr = HIGH_BITS[BITS]
    codes = _plane_codes(rows, channel, inside, D * LOW // 8, LOW)
    if HIGH > 0:
        codes |= _plane_codes(rows + D * LOW // 8, channel, inside, D * HIGH // 8, HIGH) << LOW
    return codes


@triton.jit
def _plane_words(rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """Return a plane in words of 32 bits: a tuple of WIDTH runs of D / 8 bytes, each (N, D / 32)."""
    word = tl.arange(0, D // 32)
    runs = ()
    for run in tl.static_range(WIDTH):
        runs = runs + (tl.load((rows + run * D // 8).to(tl.pointer_type(tl.int32))[:, None] + word[None, :]),)
    return runs


@triton.jit
def _load_words(rows, D: tl.constexpr, BITS: tl.constexpr):
    """Return the planes of whole rows in words, one or two; D is a power of two, of at least 32."""
    LOW: tl.constexpr = LOW_BITS[BITS]
    HIGH: tl.constexpr = HIGH_BITS[BITS]
    planes = (_plane_words(rows, D, LOW),)
    if HIGH > 0:
        planes = planes + (_plane_words(rows + D * LOW // 8, D, HIGH),)
    return planes


@triton.jit
def _pair(runs, SLOT: tl.constexpr, HALF: tl.constexpr):
    """Return two codes of each word, 16 bits apart: of channels SLOT * D / 8 + 4 * word + HALF, and of that plus 2."""
    WIDTH: tl.constexpr = len(runs)
    return (runs[SLOT % WIDTH] >> (SLOT // WIDTH * WIDTH + HALF * 8)) & ((2**WIDTH - 1) * 0x10001)


@triton.jit
def _code_pairs(planes, SLOT: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """Return two codes of each word as `_pair` does, their planes put together."""
    pair = _pair(planes[0], SLOT, HALF)
    if HIGH_BITS[BITS] > 0:
        pair |= _pair(planes[1], SLOT, HALF) << LOW_BITS[BITS]
    return pair


@triton.jit
def _interleaved(parts, FIRST: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """Join parts FIRST, FIRST + STRIDE ... along dimensions of two behind the last one, in order."""
    if COUNT == 1:
        joined = parts[FIRST]
    else:
        even = _interleaved(parts, FIRST, STRIDE * 2, COUNT // 2)
        joined = tl.join(even, _interleaved(parts, FIRST + STRIDE, STRIDE * 2, COUNT // 2))
    return joined


@triton.jit
def _halves(pairs, DTYPE: tl.constexpr):
    """Return pairs of 16 bits, each (N, D / 32), as what they hold: (N, D / 16 * pairs), neighbours together."""
    low, high = (), ()
    for i in tl.static_range(len(pairs)):
        low = low + ((pairs[i] & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True),)
        high = high + ((pairs[i] >> 16).to(tl.uint16).to(DTYPE, bitcast=True),)
    joined = tl.join(_interleaved(low, 0, 1, len(pairs)), _interleaved(high, 0, 1, len(pairs)))
    return tl.reshape(joined, (pairs[0].shape[0], pairs[0].shape[1] * len(pairs) * 2))


@triton.jit
def column_channels(
    D: tl.constexpr, FIRST: tl.constexpr, WIDE: tl.constexpr, PADDED: tl.constexpr, IN_WORDS: tl.constexpr
):
    """Return the channel that each column of WIDE channels from FIRST on stands for, (PADDED,), and whether it is one.

    Read in words, the columns come as the words have them; queries and values then go by the same order.
    """
    column = tl.arange(0, PADDED)
    if IN_WORDS:
        SLOTS: tl.constexpr = WIDE * 8 // D
        slot = column // 4 % SLOTS
        channel = FIRST + slot * (D // 8) + column // (4 * SLOTS) * 4 + column // 2 % 2 + column % 2 * 2
    else:
        channel = FIRST + column
    return channel, (column < WIDE) & (channel < D)


@triton.jit
def _level_bits(pair, BITS: tl.constexpr, MAGNITUDES: tl.constexpr):
    """Return, for pairs of codes of at most 4 bits, the half-precision bits of their levels.

    The lower half of the levels mirrors the upper. Which of its 1, 2, 4 or 8 magnitudes a code means is a sum over its
    bits, of whole numbers, and so exact: MAGNITUDES are their bits, less those of the ones that a sum has already.
    """
    HALF: tl.constexpr = 2 ** (BITS - 1)
    upper = (pair >> (BITS - 1)) & 0x10001
    place = (pair & ((HALF - 1) * 0x10001)) ^ ((0x10001 - upper) * (HALF - 1))
    bits = (0x10001 - upper) << 15
    bits += MAGNITUDES[0] * 0x10001
    for i in tl.static_range(1, HALF):
        has = 0x10001
        for j in tl.static_range(BITS - 1):
            if (i >> j) & 1:
                has = has & (place >> j)
        bits += (has & 0x10001) * MAGNITUDES[i]
    return bits


@triton.jit
def code_source(rows, D: tl.constexpr, BITS: tl.constexpr, IN_WORDS: tl.constexpr):
    """Return what `code_numbers` makes numbers of: the words of whole rows, or where the rows begin."""
    if IN_WORDS:
        source = _load_words(rows, D, BITS)
    else:
        source = rows
    return source


@triton.jit
def code_numbers(
    source,
    levels,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    IN_WORDS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Return what codes multiply their scale with, (N, PADDED), columns as `column_channels` says.

    For a rotated tensor the levels; else the codes less the middle one, 2^(BITS - 1): small, so that what they are
    multiplied with rounds less. In half precision a code put into the lowest bits of 1024 is added to it.
    """
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    if IN_WORDS:
        SLOTS: tl.constexpr = WIDE * 8 // D
        pairs = ()
        for i in tl.static_range(SLOTS * 2):
            pair = _code_pairs(source, FIRST * 8 // D + i // 2, i % 2, BITS)
            if tl.float16 == DOT and SCHEME != ROTATED:
                pair = pair | 0x64006400
            elif tl.float16 == DOT and BITS <= 4:
                pair = _level_bits(pair, BITS, MAGNITUDES)
            pairs = pairs + (pair,)
        if tl.float16 == DOT and SCHEME != ROTATED:
            numbers = _halves(pairs, tl.float16) - (1024.0 + MIDDLE)
        elif tl.float16 == DOT and BITS <= 4:
            numbers = _halves(pairs, tl.float16)
        elif SCHEME == ROTATED:
            numbers = tl.load(levels + _halves(pairs, tl.uint16).to(tl.int32)).to(DOT)
        else:
            numbers = _halves(pairs, tl.uint16).to(DOT) - MIDDLE
    else:
        channel, inside = column_channels(D, FIRST, WIDE, PADDED, False)
        codes = load_codes(source, channel, inside, D, BITS)
        if SCHEME == ROTATED:
            numbers = tl.load(levels + codes.to(tl.int32)).to(DOT)
        else:
            numbers = tl.where(inside[None, :], codes.to(DOT) - MIDDLE, 0.0)
    return numbers


@triton.jit
def _page_address(table, page, pages, rest, COLUMN: tl.constexpr):
    """Return where a tensor of a page begins; behind the last page comes the rest."""
    listed = tl.load(table + page * PAGE_COLUMNS + COLUMN, mask=page < pages, other=0)
    place = tl.where(page < pages, listed, rest.to(tl.int64))
    return tl.multiple_of(place.to(tl.pointer_type(rest.dtype.element_ty)), 16)


@triton.jit
def open_page(
    x, page, bh, SCHEME: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr
):
    """Return where the codes, scales and zeros of one head begin in a page, and how many tokens it has.

    x: the table of pages, how many there are, codes, scales, zeros and tokens of the rest behind them.
    """
    table, pages, rest, rest_scale, rest_zero, rest_tokens = x
    tokens = tl.where(page < pages, PAGE, rest_tokens)
    if SCHEME == CHANNEL:
        scales = tokens // GROUP * D
    elif SCHEME == TOKEN:
        scales = tokens * ((D + GROUP - 1) // GROUP)
    else:
        scales = tokens
    codes_at = _page_address(table, page, pages, rest, 0) + bh * tokens * (D * BITS // 8)
    scale_at = _page_address(table, page, pages, rest_scale, 1) + bh * scales
    return codes_at, scale_at, _page_address(table, page, pages, rest_zero, 2) + bh * scales, tokens
