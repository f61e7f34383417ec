"""The cache's three operations as Triton kernels: pack, unpack, attend. `runtime.fused` launches them.

Reads and writes packed blocks on a GPU, or under Triton's interpreter on the CPU. Packing and unpacking give the very
bits of `torch_kernels`; attention sums in another order. Does not know layers, nor when a token is quantized.

Letters in kernels: M query heads of one KV head, N tokens of a tile, D channels. A name in capitals is a constant that
a kernel is compiled for: a plan of many formats runs many compiled kernels, none of which looks a format up.
"""

from __future__ import annotations

import triton
import triton.language as tl

FULL = tl.constexpr(0)
CHANNEL = tl.constexpr(1)
TOKEN = tl.constexpr(2)
ROTATED = tl.constexpr(3)
"""How a tensor is held: in the model's dtype; in codes with a scale a channel, or a scale a token; rotated."""

HALF, SINGLE = tl.float16, tl.float32
"""What attention multiplies codes in: half precision, or single where scales or queries need it."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run under the interpreter, which cuts bfloat16 off and multiplies its bits: helped around here."""

PAGE_COLUMNS = tl.constexpr(3)
"""Addresses of one page in the table: of its codes, scales and zeros."""


# ---- codes in bytes (`packing` says how they lie)


@triton.jit
def _plane_codes(rows, channel, inside, BYTES: tl.constexpr, WIDTH: tl.constexpr):
    """Return what a plane of BYTES bytes holds of codes (N, C); rows: where it begins for each token, (N,)."""
    packed = tl.load(rows[:, None] + (channel % BYTES)[None, :], mask=inside[None, :], other=0)
    return (packed >> ((channel // BYTES) * WIDTH).to(tl.uint8)[None, :]) & (2**WIDTH - 1)


@triton.jit
def _load_codes(rows, channel, inside, D: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of any channels, (N, C), uint8; rows: where the bytes of each token begin, (N,)."""
    if BITS == 3:
        codes = _plane_codes(rows, channel, inside, D // 4, 2)
        codes |= _plane_codes(rows + D // 4, channel, inside, D // 8, 1) << 2
    elif BITS == 5:
        codes = _plane_codes(rows, channel, inside, D // 2, 4)
        codes |= _plane_codes(rows + D // 2, channel, inside, D // 8, 1) << 4
    elif BITS == 6:
        codes = _plane_codes(rows, channel, inside, D // 2, 4)
        codes |= _plane_codes(rows + D // 2, channel, inside, D // 4, 2) << 4
    else:
        codes = _plane_codes(rows, channel, inside, D * BITS // 8, BITS)
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
    """Return the planes of whole rows in words; D is a power of two, of at least 32."""
    if BITS == 3:
        planes = (_plane_words(rows, D, 2), _plane_words(rows + D // 4, D, 1))
    elif BITS == 5:
        planes = (_plane_words(rows, D, 4), _plane_words(rows + D // 2, D, 1))
    elif BITS == 6:
        planes = (_plane_words(rows, D, 4), _plane_words(rows + D // 2, D, 2))
    else:
        planes = (_plane_words(rows, D, BITS),)
    return planes


@triton.jit
def _pair(runs, SLOT: tl.constexpr, HALF: tl.constexpr):
    """Return two codes of each word, 16 bits apart: of channels SLOT * D / 8 + 4 * word + HALF, and of that plus 2."""
    WIDTH: tl.constexpr = len(runs)
    return (runs[SLOT % WIDTH] >> (SLOT // WIDTH * WIDTH + HALF * 8)) & ((2**WIDTH - 1) * 0x10001)


@triton.jit
def _code_pairs(planes, SLOT: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    if BITS == 3:
        pair = _pair(planes[0], SLOT, HALF) | (_pair(planes[1], SLOT, HALF) << 2)
    elif BITS == 5 or BITS == 6:
        pair = _pair(planes[0], SLOT, HALF) | (_pair(planes[1], SLOT, HALF) << 4)
    else:
        pair = _pair(planes[0], SLOT, HALF)
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
def _column_channels(
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


# ---- numbers and codes


@triton.jit
def _limited(x, low, high):
    """Return x within bounds; what is no number stays none."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Return float32 in a dtype, rounded to the nearest, halves to the even one."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(DTYPE)
    return rounded


@triton.jit
def _codes_of(x, scale, zero, TOP: tl.constexpr):
    """Return the codes of numbers, float32, taken with scale and zero as they are stored."""
    step = scale.to(tl.float32)
    distance = x - zero.to(tl.float32)
    steps = tl.div_rn(distance, tl.broadcast_to(tl.where(step == 0, 1.0, step), distance.shape))
    # Added and taken away, 1.5 * 2^23 rounds what lies below 2^22 to a whole number, halves to the even one.
    codes = (_limited(steps, 0.0, TOP) + 12582912.0) - 12582912.0
    return tl.where(step == 0, 0.0, codes)


@triton.jit
def _of_range(
    low,
    high,
    TOP: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_MAX: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_MAX: tl.constexpr,
):
    """Return scale and zero, as stored, where codes span low to high."""
    scale = tl.div_rn(high - low, tl.full(low.shape, TOP, tl.float32))
    return (
        _rounded(_limited(scale, -SCALE_MAX, SCALE_MAX), SCALE),
        _rounded(_limited(low, -ZERO_MAX, ZERO_MAX), ZERO),
    )


@triton.jit
def _hadamard(x, LOG_D: tl.constexpr):
    """Multiply rows (N, D) by Sylvester's matrix of 1 and -1, D = 2^LOG_D: a butterfly on each bit of the channel."""
    N: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    for _ in tl.static_range(LOG_D):
        even, odd = tl.split(tl.reshape(x, (N, D // 2, 2)))  # of the lowest bit, which becomes the highest
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (N, D))
    return x


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
def _code_source(rows, D: tl.constexpr, BITS: tl.constexpr, IN_WORDS: tl.constexpr):
    """Return what `_numbers` makes numbers of: the words of whole rows, or where the rows begin."""
    if IN_WORDS:
        source = _load_words(rows, D, BITS)
    else:
        source = rows
    return source


@triton.jit
def _numbers(
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
    """Return what codes multiply their scale with, (N, PADDED), columns as `_column_channels` says.

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
        channel, inside = _column_channels(D, FIRST, WIDE, PADDED, False)
        codes = _load_codes(source, channel, inside, D, BITS)
        if SCHEME == ROTATED:
            numbers = tl.load(levels + codes.to(tl.int32)).to(DOT)
        else:
            numbers = tl.where(inside[None, :], codes.to(DOT) - MIDDLE, 0.0)
    return numbers


# ---- quantize and pack


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
        low = tl.min(tl.where(inside, numbers, float("inf")), ALONG, keep_dims=True)
        high = tl.max(tl.where(inside, numbers, float("-inf")), ALONG, keep_dims=True)
        broken = tl.max((numbers != numbers).to(tl.int32), ALONG, keep_dims=True) > 0
        low, high = tl.where(broken, float("nan"), low), tl.where(broken, float("nan"), high)
        best_scale, best_zero = _of_range(low, high, TOP, SCALE, SCALE_MAX, ZERO, ZERO_MAX)
        if len(FRACTIONS) > 0:
            middle, reach = (low + high) / 2, (high - low) / 2
            least = _squared_error(numbers, inside, best_scale, best_zero, TOP, ALONG)
            for i in tl.static_range(len(FRACTIONS)):
                away = reach * FRACTIONS[i]
                new_scale, new_zero = _of_range(middle - away, middle + away, TOP, SCALE, SCALE_MAX, ZERO, ZERO_MAX)
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
    if BITS == 3:
        _pack_plane(x_at, rows, scale, zero, unit, valid, D, ALL, GROUP, BY_CHANNEL, TOP, 0, 2)
        _pack_plane(x_at, rows + D // 4, scale, zero, unit, valid, D, ALL, GROUP, BY_CHANNEL, TOP, 2, 1)
    elif BITS == 5:
        _pack_plane(x_at, rows, scale, zero, unit, valid, D, ALL, GROUP, BY_CHANNEL, TOP, 0, 4)
        _pack_plane(x_at, rows + D // 2, scale, zero, unit, valid, D, ALL, GROUP, BY_CHANNEL, TOP, 4, 1)
    elif BITS == 6:
        _pack_plane(x_at, rows, scale, zero, unit, valid, D, ALL, GROUP, BY_CHANNEL, TOP, 0, 4)
        _pack_plane(x_at, rows + D // 2, scale, zero, unit, valid, D, ALL, GROUP, BY_CHANNEL, TOP, 4, 2)
    else:
        _pack_plane(x_at, rows, scale, zero, unit, valid, D, ALL, GROUP, BY_CHANNEL, TOP, 0, BITS)


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
    row = tl.arange(0, valid.shape[0])
    byte = tl.arange(0, ALL * WIDTH // 8)
    inside = valid[:, None] & (byte < BYTES)[None, :]
    packed = tl.zeros(inside.shape, tl.int32)
    for slot in tl.static_range(8 // WIDTH):
        channel = slot * BYTES + byte
        numbers = tl.load(x_at[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        if BY_CHANNEL:
            place = unit + channel[None, :] + (row * 0)[:, None]
        else:
            place = unit + (channel // GROUP)[None, :]
        codes = _codes_of(
            numbers, tl.load(scale + place, mask=inside, other=0.0), tl.load(zero + place, mask=inside, other=0.0), TOP
        )
        packed |= ((codes.to(tl.int32) >> PLACE) & (2**WIDTH - 1)) << (slot * WIDTH)
    tl.store(rows[:, None] + byte[None, :], packed.to(tl.uint8), mask=inside)


@triton.jit
def _squared_error(numbers, inside, scale, zero, TOP: tl.constexpr, ALONG: tl.constexpr):
    away = _codes_of(numbers, scale, zero, TOP) * scale.to(tl.float32) + zero.to(tl.float32) - numbers
    return tl.sum(tl.where(inside, away * away, 0.0).to(tl.float64), ALONG, keep_dims=True)


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
    y = _hadamard(numbers, LOG_D) / root
    size = tl.sqrt(tl.sum(y * y, 1, keep_dims=True) / D)
    stored = _rounded(_limited(size, -SCALE_MAX, SCALE_MAX).to(tl.float32), scale.dtype.element_ty)
    step = stored.to(tl.float64)
    y = y / tl.where(step == 0, 1.0, step)
    found = tl.zeros(y.shape, tl.int32)  # how many edges lie below, by halving
    for i in tl.static_range(BITS):
        half = 2 ** (BITS - 1 - i)
        found = tl.where(y > tl.load(edges + found + (half - 1)), found + half, found)
    tl.store(scale + bh * tokens + token[:, None], stored, mask=valid[:, None])
    rows = codes + (bh * tokens + token) * (D * BITS // 8)
    if BITS == 3:
        _store_plane(rows, found, valid, 0, 2)
        _store_plane(rows + D // 4, found, valid, 2, 1)
    elif BITS == 5:
        _store_plane(rows, found, valid, 0, 4)
        _store_plane(rows + D // 2, found, valid, 4, 1)
    elif BITS == 6:
        _store_plane(rows, found, valid, 0, 4)
        _store_plane(rows + D // 2, found, valid, 4, 2)
    else:
        _store_plane(rows, found, valid, 0, BITS)


@triton.jit
def _store_plane(rows, codes, valid, PLACE: tl.constexpr, WIDTH: tl.constexpr):
    """Write the bits PLACE to PLACE + WIDTH of codes (N, D), int32, D a power of two."""
    SLOTS: tl.constexpr = 8 // WIDTH
    BYTES: tl.constexpr = codes.shape[1] // SLOTS
    part = tl.reshape((codes >> PLACE) & (2**WIDTH - 1), (codes.shape[0], SLOTS, BYTES))
    packed = tl.sum(part << (tl.arange(0, SLOTS) * WIDTH)[None, :, None], 1)
    place = rows[:, None] + tl.arange(0, BYTES)[None, :]
    tl.store(place, packed.to(tl.uint8), mask=valid[:, None])


# ---- pages


@triton.jit
def _address(table, page, pages, rest, COLUMN: tl.constexpr):
    """Return where a tensor of a page begins; behind the last page comes the rest."""
    listed = tl.load(table + page * PAGE_COLUMNS + COLUMN, mask=page < pages, other=0)
    place = tl.where(page < pages, listed, rest.to(tl.int64))
    return tl.multiple_of(place.to(tl.pointer_type(rest.dtype.element_ty)), 16)


# ---- unpack


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
):
    """Write what codes stand for into (B, H, T, D). A program has N tokens of a page and WIDE channels, PADDED."""
    bh = tl.program_id(0).to(tl.int64)
    TILES: tl.constexpr = (PAGE + N - 1) // N
    page = tl.program_id(1) // TILES
    tokens = tl.where(page < pages, PAGE, rest_tokens)
    row = (tl.program_id(1) % TILES) * N + tl.arange(0, N)
    known = tl.minimum(row, tokens - 1)
    codes_at = _address(table, page, pages, rest_codes, 0) + (bh * tokens + known) * (D * BITS // 8)
    scale_at = _address(table, page, pages, rest_scale, 1)
    for g in tl.static_range((D + WIDE - 1) // WIDE):
        channel, inside = _column_channels(D, g * WIDE, WIDE, PADDED, False)
        codes = _load_codes(codes_at, channel, inside, D, BITS)
        if SCHEME == ROTATED:
            y = _hadamard(tl.load(levels + codes.to(tl.int32)), LOG_D) * tl.load(signs + channel)[None, :]
            scale = tl.load(scale_at + bh * tokens + known).to(tl.float32)
            numbers = y * tl.div_rn(scale, tl.full(scale.shape, ROOT_D, tl.float32))[:, None]
        else:
            zero_at = _address(table, page, pages, rest_zero, 2)
            if SCHEME == CHANNEL:
                place = (bh * (tokens // GROUP) + known // GROUP)[:, None] * D + tl.minimum(channel, D - 1)[None, :]
            else:
                place = ((bh * tokens + known) * ((D + GROUP - 1) // GROUP) + g)[:, None]
            numbers = codes.to(tl.float32) * tl.load(scale_at + place).to(tl.float32)
            numbers = numbers + tl.load(zero_at + place).to(tl.float32)
        token = (page * PAGE + row).to(tl.int64)
        place = out + (bh // heads) * stride_b + (bh % heads) * stride_h
        place += token[:, None] * stride_t + channel[None, :]
        stored = (row < tokens)[:, None] & inside[None, :]
        tl.store(place, _rounded(numbers, out.dtype.element_ty), mask=stored)


# ---- attend


@triton.jit
def _paged_numbers(
    table, pages, rest, rest_tokens, bh, token, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr
):
    """Return tokens of a tensor in full precision, (N, PADDED), from whatever pages they are in."""
    page = token // PAGE
    listed = tl.load(table + page * PAGE_COLUMNS, mask=page < pages, other=0)
    place = tl.where(page < pages, listed, rest.to(tl.int64)).to(tl.pointer_type(rest.dtype.element_ty))
    held = tl.where(page < pages, PAGE, rest_tokens)
    row = tl.minimum(token % PAGE, held - 1)
    column = tl.arange(0, PADDED)
    places = tl.multiple_of(place, 16)[:, None] + ((bh * held + row) * D)[:, None] + column[None, :]
    return tl.load(places, mask=column[None, :] < D, other=0.0)


@triton.jit
def _flat_numbers(numbers, first, count, bh, token, channel, inside, D: tl.constexpr):
    """Return channels of tokens in full precision, (N, C), that lie behind each other from token `first` on."""
    row = tl.minimum(tl.maximum(token - first, 0), count - 1)
    return tl.load(numbers + ((bh * count + row) * D)[:, None] + channel[None, :], mask=inside[None, :], other=0.0)


@triton.jit
def _two_part_dot(x, numbers, DOT: tl.constexpr):
    """Multiply x (M, K), float32, by numbers (K, N) of a dtype that would round x: what it rounds away comes second."""
    if tl.float32 == DOT:
        product = _dot(x, numbers)
    else:
        high = x.to(DOT)
        low = (x - high.to(tl.float32)).to(DOT)
        product = _dot(high, numbers) + _dot(low, numbers)
    return product


@triton.jit
def _dot(x, y):
    """Multiply x (M, K) by y (K, N), and add in float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _open_page(
    x, page, bh, SCHEME: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr
):
    """Return where the codes, scales and zeros of one head begin in a page, and how many tokens it has."""
    table, pages, rest, rest_scale, rest_zero, rest_tokens, levels = x
    tokens = tl.where(page < pages, PAGE, rest_tokens)
    if SCHEME == CHANNEL:
        scales = tokens // GROUP * D
    elif SCHEME == TOKEN:
        scales = tokens * ((D + GROUP - 1) // GROUP)
    else:
        scales = tokens
    codes_at = _address(table, page, pages, rest, 0) + bh * tokens * (D * BITS // 8)
    scale_at = _address(table, page, pages, rest_scale, 1) + bh * scales
    return codes_at, scale_at, _address(table, page, pages, rest_zero, 2) + bh * scales, tokens, levels


@triton.jit
def _largest_scales(
    opened, SCHEME: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, PADDED_PAGE: tl.constexpr
):
    """Return the largest scale of each group of channels in a page; 1 where the scales are by channel, or all 0."""
    _, scale_at, _, tokens, _ = opened
    GROUPS: tl.constexpr = (D + WIDE - 1) // WIDE
    token = tl.arange(0, PADDED_PAGE)
    largest = ()
    for g in tl.static_range(GROUPS):
        if SCHEME == CHANNEL:
            found = 1.0
        else:
            found = tl.max(tl.load(scale_at + token * GROUPS + g, mask=token < tokens, other=0.0).to(tl.float32), 0)
            found = tl.where(found == 0, 1.0, found)
        largest = largest + (found,)
    return largest


@triton.jit
def _coded_scores(
    q,
    opened,
    place,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
    IN_WORDS: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
):
    """Return the scores (M, N) of N keys in codes, from one at a place in a page on, for queries q of size 1 at most.

    By channel, s * c + z is never made: (q * s) . c + q . z has the same value, and the scale once a group.
    """
    codes_at, scale_at, zero_at, tokens, levels = opened
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    GROUPS: tl.constexpr = (D + WIDE - 1) // WIDE
    row = tl.minimum(place + tl.arange(0, N), tokens - 1)
    source = _code_source(codes_at + row * (D * BITS // 8), D, BITS, IN_WORDS)
    scores = tl.zeros((q[0].shape[0], N), tl.float32)
    for g in tl.static_range(GROUPS):
        numbers = _numbers(source, levels, D, g * WIDE, WIDE, PADDED, SCHEME, BITS, MAGNITUDES, IN_WORDS, DOT)
        if SCHEME == CHANNEL:
            channel, inside = _column_channels(D, 0, D, PADDED, IN_WORDS)
            unit = place // GROUP * D + channel
            scale = tl.load(scale_at + unit, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zero_at + unit, mask=inside, other=0.0).to(tl.float32) + scale * MIDDLE
            scores += _two_part_dot(q[0] * scale[None, :], tl.trans(numbers), DOT)
            scores += tl.sum(q[0] * zero[None, :], 1)[:, None]
        else:
            scale = tl.load(scale_at + row * GROUPS + g).to(tl.float32)
            scores += _two_part_dot(q[g], tl.trans(numbers), DOT) * scale[None, :]
            if SCHEME == TOKEN:
                zero = tl.load(zero_at + row * GROUPS + g).to(tl.float32) + scale * MIDDLE
                scores += tl.sum(q[g], 1)[:, None] * zero[None, :]
    return scores


@triton.jit
def _with_coded(
    sums,
    offsets,
    p,
    opened,
    largest,
    place,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
    IN_WORDS: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
):
    """Add N values in codes, from one at a place in a page on, weighted with p (M, N), to sums (M, PADDED) of channels.

    A scale a token goes into the weights, as a share of the page's largest scale: half precision is densest below 1.
    What is added counts such largest scales. A zero a token is the same for all channels of its group, whose offsets
    (M, N) it goes to.
    """
    codes_at, scale_at, zero_at, tokens, levels = opened
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    GROUPS: tl.constexpr = (D + WIDE - 1) // WIDE
    row = tl.minimum(place + tl.arange(0, N), tokens - 1)
    source = _code_source(codes_at + row * (D * BITS // 8), D, BITS, IN_WORDS)
    added, shifted = (), ()
    for g in tl.static_range(GROUPS):
        numbers = _numbers(source, levels, D, g * WIDE, WIDE, PADDED, SCHEME, BITS, MAGNITUDES, IN_WORDS, DOT)
        offset = offsets[g]
        if SCHEME == CHANNEL:
            channel, inside = _column_channels(D, 0, D, PADDED, IN_WORDS)
            unit = place // GROUP * D + channel
            scale = tl.load(scale_at + unit, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zero_at + unit, mask=inside, other=0.0).to(tl.float32) + scale * MIDDLE
            total = sums[g] + _dot(p.to(DOT), numbers) * scale[None, :] + tl.sum(p, 1)[:, None] * zero[None, :]
        else:
            scale = tl.load(scale_at + row * GROUPS + g).to(tl.float32)
            weights = p * (scale * (1.0 / largest[g]))[None, :]
            total = sums[g] + _dot(weights.to(DOT), numbers)
            if SCHEME == TOKEN:
                zero = tl.load(zero_at + row * GROUPS + g).to(tl.float32) + scale * MIDDLE
                offset += p * zero[None, :]
        added = added + (total,)
        shifted = shifted + (offset,)
    return added, shifted


@triton.jit
def _with_flat(
    sums,
    p,
    numbers,
    first,
    count,
    bh,
    token,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
    IN_WORDS: tl.constexpr,
):
    """Add values in full precision to the sums of channels, as `_with_coded` does those in codes."""
    added = ()
    for g in tl.static_range((D + WIDE - 1) // WIDE):
        channel, inside = _column_channels(D, g * WIDE, WIDE, PADDED, IN_WORDS)
        values = _flat_numbers(numbers, first, count, bh, token, channel, inside, D)
        added = added + (sums[g] + _two_part_dot(p, values, values.dtype),)
    return added


@triton.jit
def _shrunk(sums, by):
    less = ()
    for g in tl.static_range(len(sums)):
        less = less + (sums[g] * by[:, None],)
    return less


@triton.jit
def _counted_in(sums, units, new):
    """Return sums that count some units, group by group, in new ones."""
    counted = ()
    for g in tl.static_range(len(sums)):
        counted = counted + (sums[g] * (units[g] / new[g]),)
    return counted


@triton.jit
def _weights(scores, largest):
    """Return the weights of a tile's scores, base 2, by how much earlier sums shrink, and the largest score now."""
    now = tl.maximum(largest, tl.max(scores, 1))
    finite = tl.where(now == float("-inf"), 0.0, now)
    return tl.exp2(scores - finite[:, None]), tl.exp2(largest - finite), now


@triton.jit
def _masked(scores, valid, mask, token, HAS_MASK: tl.constexpr):
    """Close tokens that are not of this program, or that the mask closes; add a mask of numbers, base 2."""
    if HAS_MASK == 1:
        valid = valid & (tl.load(mask + token, mask=valid, other=0) != 0)
    if HAS_MASK == 2:
        scores += tl.load(mask + token, mask=valid, other=0.0).to(tl.float32)[None, :] * 1.4426950408889634
    return tl.where(valid[None, :], scores, float("-inf"))


@triton.jit
def _capped(scores, cap, SOFTCAP: tl.constexpr):
    """Return cap * tanh(scores), where the model has a cap."""
    if SOFTCAP:
        scores = cap * (1 - 2 / (tl.exp(2 * scores) + 1))
    return scores


@triton.jit(
    do_not_specialize=[
        "mask_stride", "k_pages", "k_rest_tokens", "v_pages", "v_rest_tokens", "k_first", "v_first", "k_coded_end",
        "v_coded_end", "start", "stop", "late", "tokens", "main", "main_tiles", "sinks", "mixed", "k_late", "v_late",
    ]
)  # fmt: skip
def attend_splits(
    q,
    q_rotated,
    partial,
    extent,
    factor,
    cap,
    mask,
    mask_stride,
    k_table,
    k_pages,
    k_rest,
    k_rest_scale,
    k_rest_zero,
    k_rest_tokens,
    k_levels,
    k_sinks,
    k_recent,
    v_table,
    v_pages,
    v_rest,
    v_rest_scale,
    v_rest_zero,
    v_rest_tokens,
    v_levels,
    v_sinks,
    v_recent,
    k_first,
    v_first,
    k_coded_end,
    v_coded_end,
    start,
    stop,
    late,
    tokens,
    main,
    main_tiles,
    sinks,
    mixed,
    k_late,
    v_late,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K_SCHEME: tl.constexpr,
    K_BITS: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_MAGNITUDES: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_D: tl.constexpr,
    K_WIDE: tl.constexpr,
    V_SCHEME: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_MAGNITUDES: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_D: tl.constexpr,
    V_WIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K_ALL: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_ALL: tl.constexpr,
    V_PADDED: tl.constexpr,
    K_IN_WORDS: tl.constexpr,
    V_IN_WORDS: tl.constexpr,
    STRETCH: tl.constexpr,
    V_PADDED_PAGE: tl.constexpr,
    OTHER_TILES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attend with the query heads of one KV head to one split of the tokens; `merge_splits` does the rest.

    The tokens fall into four runs, each of its own splits: [start, stop), where keys and values both lie in pages
    (`main` splits); before it, where a sink is in full precision; [stop, late), where only the keys (`k_late`) or
    only the values (`v_late`) are in codes already; and the recent ones. A tensor of 16 bits is in pages everywhere.

    partial: (B * query heads, splits, V_D), float32, the weighted values. extent: (B * query heads, splits, 2),
    the largest score, base 2, and the sum of weights.
    """
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, M)
    asks = head < QUERIES
    mask += (bh // HEADS) * mask_stride
    k = (k_table, k_pages, k_rest, k_rest_scale, k_rest_zero, k_rest_tokens, k_levels)
    v = (v_table, v_pages, v_rest, v_rest_scale, v_rest_zero, v_rest_tokens, v_levels)

    channel = tl.arange(0, K_ALL)
    q_at = (bh * QUERIES + head)[:, None] * K_D
    exact = tl.load(q + q_at + channel[None, :], mask=asks[:, None] & (channel[None, :] < K_D), other=0.0)
    source = q_rotated if K_SCHEME == ROTATED else q
    whole = tl.load(source + q_at + channel[None, :], mask=asks[:, None] & (channel[None, :] < K_D), other=0.0)
    size = tl.max(tl.abs(whole.to(tl.float32)), 1)
    size = tl.where(size == 0, 1.0, size)
    unit_q = ()
    for g in tl.static_range((K_D + K_WIDE - 1) // K_WIDE):
        column, inside = _column_channels(K_D, g * K_WIDE, K_WIDE, K_PADDED, K_IN_WORDS)
        piece = tl.load(source + q_at + column[None, :], mask=asks[:, None] & inside[None, :], other=0.0)
        unit_q = unit_q + (piece.to(tl.float32) / size[:, None],)
    size *= factor

    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M, N), tl.float32)
    sums, offsets, one = (), (), ()
    for _ in tl.static_range((V_D + V_WIDE - 1) // V_WIDE):
        sums = sums + (tl.zeros((M, V_PADDED), tl.float32),)
        offsets = offsets + (tl.zeros((M, N if V_SCHEME == TOKEN else 1), tl.float32),)
        one = one + (1.0,)

    if split < main:
        units = one
        low = start + split * main_tiles * N
        high = tl.minimum(low + main_tiles * N, stop)
        for stretch in range((low - start) // STRETCH, tl.cdiv(high - start, STRETCH)):
            begin = tl.maximum(low, start + stretch * STRETCH)
            end = tl.minimum(high, start + (stretch + 1) * STRETCH)
            if K_SCHEME != FULL:
                k_opened = _open_page(k, (begin - k_first) // K_PAGE, bh, K_SCHEME, K_BITS, K_GROUP, K_D, K_PAGE)
            if V_SCHEME != FULL:
                v_opened = _open_page(v, (begin - v_first) // V_PAGE, bh, V_SCHEME, V_BITS, V_GROUP, V_D, V_PAGE)
                new = _largest_scales(v_opened, V_SCHEME, V_D, V_WIDE, V_PAGE, V_PADDED_PAGE)
                sums, units = _counted_in(sums, units, new), new
            for tile in range(0, tl.cdiv(end - begin, N)):
                first = begin + tile * N
                token = first + tl.arange(0, N)
                if K_SCHEME == FULL:
                    keys = _paged_numbers(k_table, k_pages, k_rest, k_rest_tokens, bh, token, K_D, K_ALL, K_PAGE)
                    scores = _dot(exact, tl.trans(keys)) * factor
                else:
                    scores = size[:, None] * _coded_scores(
                        unit_q, k_opened, (begin - k_first) % K_PAGE + tile * N,
                        K_SCHEME, K_BITS, K_GROUP, K_MAGNITUDES, K_D, K_WIDE, K_PADDED, K_IN_WORDS, N, DOT,
                    )  # fmt: skip
                scores = _masked(_capped(scores, cap, SOFTCAP), token < stop, mask, token, HAS_MASK)
                p, shrunk, largest = _weights(scores, largest)
                sums, offsets = _shrunk(sums, shrunk), _shrunk(offsets, shrunk)
                total = total * shrunk[:, None] + p
                if V_SCHEME == FULL:
                    values = _paged_numbers(v_table, v_pages, v_rest, v_rest_tokens, bh, token, V_D, V_ALL, V_PAGE)
                    sums = (sums[0] + _two_part_dot(p, values, values.dtype),)
                else:
                    sums, offsets = _with_coded(
                        sums, offsets, p, v_opened, units, (begin - v_first) % V_PAGE + tile * N,
                        V_SCHEME, V_BITS, V_GROUP, V_MAGNITUDES, V_D, V_WIDE, V_PADDED, V_IN_WORDS, N, DOT,
                    )  # fmt: skip
        sums = _counted_in(sums, units, one)
    else:
        other = split - main
        low, high, origin, number = 0, start, 0, other
        k_flat, k_flat_first, k_flat_count = k_sinks, 0, start
        v_flat, v_flat_first, v_flat_count = v_sinks, 0, start
        if other >= sinks:
            low, high, origin, number = stop, late, start, other - sinks
            k_flat, k_flat_first, k_flat_count = k_recent, k_coded_end, tokens - k_coded_end
            v_flat, v_flat_first, v_flat_count = v_recent, v_coded_end, tokens - v_coded_end
        if other >= sinks + mixed:
            low, high, number = late, tokens, other - sinks - mixed
        begin = (low - origin) // N + number * OTHER_TILES
        k_in_codes = (other >= sinks) & (other < sinks + mixed) & (k_late != 0)
        v_in_codes = (other >= sinks) & (other < sinks + mixed) & (v_late != 0)
        for tile in range(begin, tl.minimum(begin + OTHER_TILES, tl.cdiv(high - origin, N))):
            first = origin + tile * N
            token = first + tl.arange(0, N)
            if K_SCHEME == FULL:
                keys = _paged_numbers(k_table, k_pages, k_rest, k_rest_tokens, bh, token, K_D, K_ALL, K_PAGE)
                scores = _dot(exact, tl.trans(keys)) * factor
            elif k_in_codes:
                opened = _open_page(k, (first - k_first) // K_PAGE, bh, K_SCHEME, K_BITS, K_GROUP, K_D, K_PAGE)
                scores = size[:, None] * _coded_scores(
                    unit_q, opened, (first - k_first) % K_PAGE,
                    K_SCHEME, K_BITS, K_GROUP, K_MAGNITUDES, K_D, K_WIDE, K_PADDED, K_IN_WORDS, N, DOT,
                )  # fmt: skip
            else:
                keys = _flat_numbers(k_flat, k_flat_first, k_flat_count, bh, token, channel, channel < K_D, K_D)
                scores = _dot(exact, tl.trans(keys)) * factor
            valid = (token >= low) & (token < high)
            scores = _masked(_capped(scores, cap, SOFTCAP), valid, mask, token, HAS_MASK)
            p, shrunk, largest = _weights(scores, largest)
            sums, offsets = _shrunk(sums, shrunk), _shrunk(offsets, shrunk)
            total = total * shrunk[:, None] + p
            if V_SCHEME == FULL:
                values = _paged_numbers(v_table, v_pages, v_rest, v_rest_tokens, bh, token, V_D, V_ALL, V_PAGE)
                sums = (sums[0] + _two_part_dot(p, values, values.dtype),)
            elif v_in_codes:
                opened = _open_page(v, (first - v_first) // V_PAGE, bh, V_SCHEME, V_BITS, V_GROUP, V_D, V_PAGE)
                units = _largest_scales(opened, V_SCHEME, V_D, V_WIDE, V_PAGE, V_PADDED_PAGE)
                sums, offsets = _with_coded(
                    _counted_in(sums, one, units), offsets, p, opened, units, (first - v_first) % V_PAGE,
                    V_SCHEME, V_BITS, V_GROUP, V_MAGNITUDES, V_D, V_WIDE, V_PADDED, V_IN_WORDS, N, DOT,
                )  # fmt: skip
                sums = _counted_in(sums, units, one)
            else:
                sums = _with_flat(
                    sums, p, v_flat, v_flat_first, v_flat_count, bh, token, V_D, V_WIDE, V_PADDED, V_IN_WORDS
                )

    splits = tl.num_programs(0)
    row = (bh * QUERIES + head) * splits + split
    tl.store(extent + row * 2, largest, mask=asks)
    tl.store(extent + row * 2 + 1, tl.sum(total, 1), mask=asks)
    for g in tl.static_range((V_D + V_WIDE - 1) // V_WIDE):
        column, inside = _column_channels(V_D, g * V_WIDE, V_WIDE, V_PADDED, V_IN_WORDS)
        values = sums[g] + tl.sum(offsets[g], 1)[:, None]
        tl.store(partial + row[:, None] * V_D + column[None, :], values, mask=asks[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["splits", "main", "sinks", "mixed", "v_late"])
def merge_splits(
    partial,
    extent,
    signs,
    out,
    splits,
    main,
    sinks,
    mixed,
    v_late,
    ROTATED_VALUES: tl.constexpr,
    ROOT_D: tl.constexpr,
    LOG_D: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Add up the splits of one query head by their log-sum-exp; rotate back what was summed in the rotated basis."""
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, SPLITS)
    largest = tl.load(extent + (row * splits + every) * 2, mask=every < splits, other=float("-inf"))
    largest = tl.max(largest, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    column = tl.arange(0, PADDED)
    total = 0.0
    plain = tl.zeros((1, PADDED), tl.float32)
    rotated = tl.zeros((1, PADDED), tl.float32)
    for start in range(0, splits, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        known = split < splits
        places = extent + (row * splits + split) * 2
        weight = tl.exp2(tl.load(places, mask=known, other=float("-inf")) - largest)
        total += tl.sum(weight * tl.load(places + 1, mask=known, other=0.0), 0)
        inside = known[:, None] & (column < D)[None, :]
        part = tl.load(partial + (row * splits + split)[:, None] * D + column[None, :], mask=inside, other=0.0)
        part = tl.where(weight[:, None] == 0, 0.0, part * weight[:, None])
        if ROTATED_VALUES:
            in_codes = (split < main) | ((v_late != 0) & (split >= main + sinks) & (split < main + sinks + mixed))
            rotated += tl.sum(tl.where(in_codes[:, None], part, 0.0), 0, keep_dims=True)
            plain += tl.sum(tl.where(in_codes[:, None], 0.0, part), 0, keep_dims=True)
        else:
            plain += tl.sum(part, 0, keep_dims=True)
    if ROTATED_VALUES:
        plain += _hadamard(rotated, LOG_D) * tl.load(signs + column)[None, :] / ROOT_D
    plain = _rounded(plain / tl.where(total == 0, 1.0, total), out.dtype.element_ty)
    tl.store(out + row * D + column[None, :], plain, mask=(column < D)[None, :])
