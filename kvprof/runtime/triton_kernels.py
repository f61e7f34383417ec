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

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run under the interpreter, which cuts bfloat16 off and multiplies its bits: helped around here."""

PAGE_COLUMNS = tl.constexpr(3)
"""Addresses of one page in the table: of its codes, scales and zeros."""


# ---- codes in bytes


@triton.jit
def _spread(packed, WIDTH: tl.constexpr):
    """Return the codes of bytes (N, W), in order: (N, W * 8 / WIDTH)."""
    N: tl.constexpr = packed.shape[0]
    W: tl.constexpr = packed.shape[1]
    if WIDTH == 8:
        return packed
    if WIDTH == 4:
        return tl.reshape(tl.join(packed & 15, packed >> 4), (N, W * 2))
    if WIDTH == 2:
        even = tl.join(packed & 3, (packed >> 4) & 3)
        odd = tl.join((packed >> 2) & 3, packed >> 6)
        return tl.reshape(tl.join(even, odd), (N, W * 4))
    c0 = tl.join(packed & 1, (packed >> 4) & 1)
    c1 = tl.join((packed >> 1) & 1, (packed >> 5) & 1)
    c2 = tl.join((packed >> 2) & 1, (packed >> 6) & 1)
    c3 = tl.join((packed >> 3) & 1, packed >> 7)
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (N, W * 8))


@triton.jit
def _gather(codes, WIDTH: tl.constexpr):
    """Return codes (N, C), below 2^WIDTH, in bytes: (N, C * WIDTH / 8). `_spread` the other way."""
    N: tl.constexpr = codes.shape[0]
    C: tl.constexpr = codes.shape[1]
    SLOTS: tl.constexpr = 8 // WIDTH
    slots = tl.reshape(codes.to(tl.int32), (N, C // SLOTS, SLOTS))
    return tl.sum(slots << (tl.arange(0, SLOTS) * WIDTH)[None, None, :], 2).to(tl.uint8)


@triton.jit
def _load_plane(rows, FIRST: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Return channels FIRST to FIRST + COUNT of a plane, (N, PADDED); rows: where it begins for each token, (N,)."""
    column = tl.arange(0, PADDED * WIDTH // 8)
    places = rows[:, None] + FIRST * WIDTH // 8 + column[None, :]
    if COUNT == PADDED:
        packed = tl.load(places)
    else:
        packed = tl.load(places, mask=column[None, :] < COUNT * WIDTH // 8, other=0)
    return _spread(packed, WIDTH)


@triton.jit
def _load_codes(
    rows, D: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr
):
    """Return the codes of channels FIRST to FIRST + COUNT, (N, PADDED); rows: where each token's bytes begin, (N,)."""
    if BITS == 3:
        high = _load_plane(rows + D * 2 // 8, FIRST, COUNT, PADDED, 1)
        return _load_plane(rows, FIRST, COUNT, PADDED, 2) | (high << 2)
    if BITS == 5:
        high = _load_plane(rows + D * 4 // 8, FIRST, COUNT, PADDED, 1)
        return _load_plane(rows, FIRST, COUNT, PADDED, 4) | (high << 4)
    if BITS == 6:
        high = _load_plane(rows + D * 4 // 8, FIRST, COUNT, PADDED, 2)
        return _load_plane(rows, FIRST, COUNT, PADDED, 4) | (high << 4)
    return _load_plane(rows, FIRST, COUNT, PADDED, BITS)


@triton.jit
def _store_plane(rows, codes, first, count, valid, PLACE: tl.constexpr, WIDTH: tl.constexpr):
    """Write a plane of codes (N, C) from channel `first` on; of them `count` columns, and the rows that are valid."""
    part = (codes.to(tl.int32) >> PLACE) & (2**WIDTH - 1)
    packed = _gather(part, WIDTH)
    column = tl.arange(0, packed.shape[1])
    places = rows[:, None] + first * WIDTH // 8 + column[None, :]
    tl.store(places, packed, mask=valid[:, None] & (column[None, :] < count * WIDTH // 8))


@triton.jit
def _store_codes(rows, codes, first, count, valid, D: tl.constexpr, BITS: tl.constexpr):
    """Write codes (N, C) from channel `first` on; rows: where each token's bytes begin, (N,)."""
    if BITS == 3:
        _store_plane(rows, codes, first, count, valid, 0, 2)
        _store_plane(rows + D * 2 // 8, codes, first, count, valid, 2, 1)
    elif BITS == 5:
        _store_plane(rows, codes, first, count, valid, 0, 4)
        _store_plane(rows + D * 4 // 8, codes, first, count, valid, 4, 1)
    elif BITS == 6:
        _store_plane(rows, codes, first, count, valid, 0, 4)
        _store_plane(rows + D * 4 // 8, codes, first, count, valid, 4, 2)
    else:
        _store_plane(rows, codes, first, count, valid, 0, BITS)


# ---- numbers and codes


@triton.jit
def _limited(x, low, high):
    """Return x within bounds; what is no number stays none."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Return float32 in a dtype, rounded to the nearest, halves to the even one."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _range_codes(
    x,
    low,
    high,
    TOP: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_MAX: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_MAX: tl.constexpr,
):
    """Return codes, scale and zero where codes span low to high, as `quantizer._encode_range` does."""
    scale = tl.div_rn(high - low, tl.full(low.shape, TOP, tl.float32))
    scale = _rounded(_limited(scale, -SCALE_MAX, SCALE_MAX), SCALE)
    zero = _rounded(_limited(low, -ZERO_MAX, ZERO_MAX), ZERO)
    step = scale.to(tl.float32)
    distance = x - zero.to(tl.float32)
    steps = tl.div_rn(distance, tl.broadcast_to(tl.where(step == 0, 1.0, step), distance.shape))
    # Added and taken away, 1.5 * 2^23 rounds what lies below 2^22 to a whole number, halves to the even one.
    codes = (_limited(steps, 0.0, TOP) + 12582912.0) - 12582912.0
    return tl.where(step == 0, 0.0, codes), scale, zero


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
def _centred(codes, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return codes less the middle one, 2^(BITS - 1), exactly: as small as they can be, what they multiply rounds less.

    In half precision the bits 0x6400 are 1024, and a code put into their lowest bits is added: no conversion is needed.
    """
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    if DTYPE == tl.float16:
        return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + MIDDLE)
    return codes.to(DTYPE) - MIDDLE


@triton.jit
def _levels(codes, table, BITS: tl.constexpr, MAGNITUDES: tl.constexpr, DTYPE: tl.constexpr):
    """Return the level of each code. Up to 4 bits they are chosen in registers: the lower half mirrors the upper."""
    if BITS > 4:
        return tl.load(table + codes.to(tl.int32)).to(DTYPE)
    HALF: tl.constexpr = 2 ** (BITS - 1)
    upper = codes >= HALF
    place = tl.where(upper, codes, ~codes) & (HALF - 1)
    level = _chosen(place, MAGNITUDES, 0, HALF, DTYPE)
    return tl.where(upper, level, -level)


@triton.jit
def _chosen(place, MAGNITUDES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """Return MAGNITUDES[FIRST + place], place below COUNT, a power of two."""
    if COUNT == 1:
        return tl.full(place.shape, MAGNITUDES[FIRST], DTYPE)
    low = _chosen(place, MAGNITUDES, FIRST, COUNT // 2, DTYPE)
    high = _chosen(place, MAGNITUDES, FIRST + COUNT // 2, COUNT // 2, DTYPE)
    return tl.where((place & (COUNT // 2)) != 0, high, low)


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

    A program has ROWS tokens and COLUMNS channels, more than the group where that is no power of two. By channel: one
    group of tokens, some channels; else: some tokens, one group of channels.
    """
    bh = tl.program_id(0).to(tl.int64)
    SPAN: tl.constexpr = GROUP if BY_CHANNEL else ROWS
    WIDE: tl.constexpr = COLUMNS if BY_CHANNEL else GROUP
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    token = tl.program_id(1) * SPAN + row
    first = tl.program_id(2) * WIDE
    count = tl.minimum(WIDE, D - first)
    valid = (row < SPAN) & (token < tokens)
    inside = valid[:, None] & (column[None, :] < count)
    place = x + (bh // heads) * stride_b + (bh % heads) * stride_h
    place += token.to(tl.int64)[:, None] * stride_t + (first + column)[None, :]
    numbers = tl.load(place, mask=inside, other=0.0).to(tl.float32)

    ALONG: tl.constexpr = 0 if BY_CHANNEL else 1
    low = tl.min(tl.where(inside, numbers, float("inf")), ALONG, keep_dims=True)
    high = tl.max(tl.where(inside, numbers, float("-inf")), ALONG, keep_dims=True)
    some = tl.max(inside.to(tl.int32), ALONG, keep_dims=True) > 0
    broken = tl.max((numbers != numbers).to(tl.int32), ALONG, keep_dims=True) > 0
    low = tl.where(broken, float("nan"), tl.where(some, low, 0.0))
    high = tl.where(broken, float("nan"), tl.where(some, high, 0.0))

    SCALE: tl.constexpr = scale.dtype.element_ty
    ZERO: tl.constexpr = zero.dtype.element_ty
    TOP: tl.constexpr = 2**BITS - 1.0
    best, best_scale, best_zero = _range_codes(numbers, low, high, TOP, SCALE, SCALE_MAX, ZERO, ZERO_MAX)
    if len(FRACTIONS) > 0:
        middle, reach = (low + high) / 2, (high - low) / 2
        least = _squared_error(numbers, inside, best, best_scale, best_zero, ALONG)
        for i in tl.static_range(len(FRACTIONS)):
            away = reach * FRACTIONS[i]
            tried, new_scale, new_zero = _range_codes(
                numbers, middle - away, middle + away, TOP, SCALE, SCALE_MAX, ZERO, ZERO_MAX
            )
            error = _squared_error(numbers, inside, tried, new_scale, new_zero, ALONG)
            better = error < least
            best = tl.where(better, tried, best)
            best_scale = tl.where(better, new_scale, best_scale)
            best_zero = tl.where(better, new_zero, best_zero)
            least = tl.where(better, error, least)

    _store_codes(codes + (bh * tokens + token) * (D * BITS // 8), best, first, count, valid, D, BITS)
    if BY_CHANNEL:
        place = (bh * (tokens // GROUP) + tl.program_id(1)) * D + first + column[None, :]
        stored = column[None, :] < count
    else:
        GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
        place = (bh * tokens + token[:, None]) * GROUPS + tl.program_id(2)
        stored = valid[:, None]
    tl.store(scale + place, best_scale, mask=stored)
    tl.store(zero + place, best_zero, mask=stored)


@triton.jit
def _squared_error(numbers, inside, codes, scale, zero, ALONG: tl.constexpr):
    away = codes * scale.to(tl.float32) + zero.to(tl.float32) - numbers
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
        STRIDE: tl.constexpr = 2 ** (BITS - 1 - i)
        found = tl.where(y > tl.load(edges + found + (STRIDE - 1)), found + STRIDE, found)
    _store_codes(codes + (bh * tokens + token) * (D * BITS // 8), found, 0, D, valid, D, BITS)
    tl.store(scale + bh * tokens + token[:, None], stored, mask=valid[:, None])


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
    MAGNITUDES: tl.constexpr,
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
    column = tl.arange(0, PADDED)
    codes_at = _address(table, page, pages, rest_codes, 0) + (bh * tokens + known) * (D * BITS // 8)
    scale_at = _address(table, page, pages, rest_scale, 1)
    for g in tl.static_range((D + WIDE - 1) // WIDE):
        FIRST: tl.constexpr = g * WIDE
        COUNT: tl.constexpr = WIDE if FIRST + WIDE <= D else D - FIRST
        codes = _load_codes(codes_at, D, FIRST, COUNT, PADDED, BITS)
        if SCHEME == ROTATED:
            y = _hadamard(_levels(codes, levels, BITS, MAGNITUDES, tl.float32), LOG_D) * tl.load(signs + column)[None, :]
            scale = tl.load(scale_at + bh * tokens + known).to(tl.float32)
            numbers = y * tl.div_rn(scale, tl.full(scale.shape, ROOT_D, tl.float32))[:, None]
        else:
            zero_at = _address(table, page, pages, rest_zero, 2)
            if SCHEME == CHANNEL:
                unit = bh * (tokens // GROUP) + known // GROUP
                place = unit[:, None] * D + FIRST + tl.minimum(column, COUNT - 1)[None, :]
            else:
                place = ((bh * tokens + known) * ((D + GROUP - 1) // GROUP) + g)[:, None]
            numbers = codes.to(tl.float32) * tl.load(scale_at + place).to(tl.float32)
            numbers = numbers + tl.load(zero_at + place).to(tl.float32)
        token = (page * PAGE + row).to(tl.int64)
        place = out + (bh // heads) * stride_b + (bh % heads) * stride_h
        place += token[:, None] * stride_t + FIRST + column[None, :]
        tl.store(
            place,
            _rounded(numbers, out.dtype.element_ty),
            mask=(row < tokens)[:, None] & (column < COUNT)[None, :],
        )


# ---- attend


@triton.jit
def _paged_numbers(table, pages, rest, rest_tokens, bh, token, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr):
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
def _flat_numbers(
    numbers, first, count, bh, token, D: tl.constexpr, FROM: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr
):
    """Return channels of tokens in full precision, (N, PADDED), that lie behind each other from token `first` on."""
    row = tl.minimum(tl.maximum(token - first, 0), count - 1)
    column = tl.arange(0, PADDED)
    places = numbers + ((bh * count + row) * D + FROM)[:, None] + column[None, :]
    return tl.load(places, mask=column[None, :] < COUNT, other=0.0)


@triton.jit
def _two_part_dot(x, numbers, DOT: tl.constexpr):
    """Multiply x (M, K), float32, by numbers (K, N) of a dtype that would round x: what it rounds away comes second."""
    if DOT == tl.float32:
        return _dot(x, numbers)
    high = x.to(DOT)
    low = (x - high.to(tl.float32)).to(DOT)
    return _dot(high, numbers) + _dot(low, numbers)


@triton.jit
def _dot(x, y):
    """Multiply x (M, K) by y (K, N), and add in float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _coded_scores(
    q,
    k,
    bh,
    place,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
):
    """Return the scores (M, N) of N keys in codes, from the one at `place` on, for queries q of size 1 at most.

    By channel, s * c + z is never made: (q * s) . c + q . z has the same value, and the scale once a group.
    """
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    table, pages, rest, rest_scale, rest_zero, rest_tokens, levels = k
    page = place // PAGE
    tokens = tl.where(page < pages, PAGE, rest_tokens)
    row = bh * tokens + tl.minimum(place % PAGE + tl.arange(0, N), tokens - 1)
    codes_at = _address(table, page, pages, rest, 0) + row * (D * BITS // 8)
    scale_at = _address(table, page, pages, rest_scale, 1)
    if SCHEME == ROTATED:
        level = _levels(_load_codes(codes_at, D, 0, D, PADDED, BITS), levels, BITS, MAGNITUDES, DOT)
        scale = tl.load(scale_at + row).to(tl.float32)
        return _two_part_dot(q[0], tl.trans(level), DOT) * scale[None, :]
    zero_at = _address(table, page, pages, rest_zero, 2)
    if SCHEME == CHANNEL:
        column = tl.arange(0, PADDED)
        unit = (bh * (tokens // GROUP) + (place % PAGE) // GROUP) * D + column
        scale = tl.load(scale_at + unit, mask=column < D, other=0.0).to(tl.float32)
        zero = tl.load(zero_at + unit, mask=column < D, other=0.0).to(tl.float32)
        codes = _centred(_load_codes(codes_at, D, 0, D, PADDED, BITS), BITS, DOT)
        scores = _two_part_dot(q[0] * scale[None, :], tl.trans(codes), DOT)
        return scores + tl.sum(q[0] * (zero + scale * MIDDLE)[None, :], 1)[:, None]
    GROUPS: tl.constexpr = (D + WIDE - 1) // WIDE
    scores = tl.zeros((q[0].shape[0], N), tl.float32)
    for g in tl.static_range(GROUPS):
        COUNT: tl.constexpr = WIDE if (g + 1) * WIDE <= D else D - g * WIDE
        codes = _centred(_load_codes(codes_at, D, g * WIDE, COUNT, PADDED, BITS), BITS, DOT)
        scale = tl.load(scale_at + row * GROUPS + g).to(tl.float32)
        zero = tl.load(zero_at + row * GROUPS + g).to(tl.float32)
        scores += _two_part_dot(q[g], tl.trans(codes), DOT) * scale[None, :]
        scores += tl.sum(q[g], 1)[:, None] * (zero + scale * MIDDLE)[None, :]
    return scores


@triton.jit
def _with_coded(
    sums,
    p,
    v,
    bh,
    place,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
):
    """Add N values in codes, from the one at `place` on, weighted with p (M, N), to the sums (M, PADDED) of channels.

    A scale a token goes into the weights; these are kept near 1, where half precision is densest.
    """
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    table, pages, rest, rest_scale, rest_zero, rest_tokens, levels = v
    page = place // PAGE
    tokens = tl.where(page < pages, PAGE, rest_tokens)
    row = bh * tokens + tl.minimum(place % PAGE + tl.arange(0, N), tokens - 1)
    codes_at = _address(table, page, pages, rest, 0) + row * (D * BITS // 8)
    scale_at = _address(table, page, pages, rest_scale, 1)
    zero_at = _address(table, page, pages, rest_zero, 2)
    GROUPS: tl.constexpr = (D + WIDE - 1) // WIDE
    added = ()
    for g in tl.static_range(GROUPS):
        COUNT: tl.constexpr = WIDE if (g + 1) * WIDE <= D else D - g * WIDE
        codes = _load_codes(codes_at, D, g * WIDE, COUNT, PADDED, BITS)
        if SCHEME == CHANNEL:
            column = tl.arange(0, PADDED)
            unit = (bh * (tokens // GROUP) + (place % PAGE) // GROUP) * D + column
            scale = tl.load(scale_at + unit, mask=column < D, other=0.0).to(tl.float32)
            zero = tl.load(zero_at + unit, mask=column < D, other=0.0).to(tl.float32)
            product = _dot(p.to(DOT), _centred(codes, BITS, DOT)) * scale[None, :]
            product += tl.sum(p, 1)[:, None] * (zero + scale * MIDDLE)[None, :]
        else:
            scale = tl.load(scale_at + row * GROUPS + g).to(tl.float32)
            largest = tl.max(scale, 0)
            weights = p * (scale / tl.where(largest == 0, 1.0, largest))[None, :]
            if SCHEME == ROTATED:
                numbers = _levels(codes, levels, BITS, MAGNITUDES, DOT)
            else:
                numbers = _centred(codes, BITS, DOT)
            product = _dot(weights.to(DOT), numbers) * largest
            if SCHEME == TOKEN:
                zero = tl.load(zero_at + row * GROUPS + g).to(tl.float32)
                product += tl.sum(p * (zero + scale * MIDDLE)[None, :], 1)[:, None]
        added = added + (sums[g] + product,)
    return added


@triton.jit
def _with_flat(
    sums, p, numbers, first, count, bh, token, D: tl.constexpr, WIDE: tl.constexpr, PADDED: tl.constexpr
):
    """Add values in full precision to the sums of channels, as `_with_coded` does those in codes."""
    added = ()
    for g in tl.static_range((D + WIDE - 1) // WIDE):
        COUNT: tl.constexpr = WIDE if (g + 1) * WIDE <= D else D - g * WIDE
        values = _flat_numbers(numbers, first, count, bh, token, D, g * WIDE, COUNT, PADDED)
        added = added + (sums[g] + _two_part_dot(p, values, values.dtype),)
    return added


@triton.jit
def _shrunk(sums, by):
    less = ()
    for g in tl.static_range(len(sums)):
        less = less + (sums[g] * by[:, None],)
    return less


@triton.jit
def _weights(scores, largest, total):
    """Return the weights of a tile's scores, base 2, the shrinking of what was summed before, and both of its sums."""
    now = tl.maximum(largest, tl.max(scores, 1))
    finite = tl.where(now == float("-inf"), 0.0, now)
    p = tl.exp2(scores - finite[:, None])
    shrunk = tl.exp2(largest - finite)
    return p, shrunk, now, total * shrunk + tl.sum(p, 1)


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
        return cap * (1 - 2 / (tl.exp(2 * scores) + 1))
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
    part = tl.arange(0, K_PADDED)
    unit_q = ()
    for g in tl.static_range((K_D + K_WIDE - 1) // K_WIDE):
        inside = asks[:, None] & ((part < K_WIDE) & (g * K_WIDE + part < K_D))[None, :]
        piece = tl.load(source + q_at + g * K_WIDE + part[None, :], mask=inside, other=0.0)
        unit_q = unit_q + (piece.to(tl.float32) / size[:, None],)
    size *= factor

    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = ()
    for _ in tl.static_range((V_D + V_WIDE - 1) // V_WIDE):
        sums = sums + (tl.zeros((M, V_PADDED), tl.float32),)

    if split < main:
        for tile in range(split * main_tiles, tl.minimum((split + 1) * main_tiles, tl.cdiv(stop - start, N))):
            first = start + tile * N
            token = first + tl.arange(0, N)
            if K_SCHEME == FULL:
                keys = _paged_numbers(k_table, k_pages, k_rest, k_rest_tokens, bh, token, K_D, K_ALL, K_PAGE)
                scores = _dot(exact, tl.trans(keys)) * factor
            else:
                scores = size[:, None] * _coded_scores(
                    unit_q, k, bh, first - k_first,
                    K_SCHEME, K_BITS, K_GROUP, K_MAGNITUDES, K_PAGE, K_D, K_WIDE, K_PADDED, N, DOT,
                )  # fmt: skip
            scores = _masked(_capped(scores, cap, SOFTCAP), token < stop, mask, token, HAS_MASK)
            p, shrunk, largest, total = _weights(scores, largest, total)
            sums = _shrunk(sums, shrunk)
            if V_SCHEME == FULL:
                values = _paged_numbers(v_table, v_pages, v_rest, v_rest_tokens, bh, token, V_D, V_ALL, V_PAGE)
                sums = (sums[0] + _two_part_dot(p, values, values.dtype),)
            else:
                sums = _with_coded(
                    sums, p, v, bh, first - v_first,
                    V_SCHEME, V_BITS, V_GROUP, V_MAGNITUDES, V_PAGE, V_D, V_WIDE, V_PADDED, N, DOT,
                )  # fmt: skip
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
                scores = size[:, None] * _coded_scores(
                    unit_q, k, bh, first - k_first,
                    K_SCHEME, K_BITS, K_GROUP, K_MAGNITUDES, K_PAGE, K_D, K_WIDE, K_PADDED, N, DOT,
                )  # fmt: skip
            else:
                keys = _flat_numbers(k_flat, k_flat_first, k_flat_count, bh, token, K_D, 0, K_D, K_ALL)
                scores = _dot(exact, tl.trans(keys)) * factor
            valid = (token >= low) & (token < high)
            scores = _masked(_capped(scores, cap, SOFTCAP), valid, mask, token, HAS_MASK)
            p, shrunk, largest, total = _weights(scores, largest, total)
            sums = _shrunk(sums, shrunk)
            if V_SCHEME == FULL:
                values = _paged_numbers(v_table, v_pages, v_rest, v_rest_tokens, bh, token, V_D, V_ALL, V_PAGE)
                sums = (sums[0] + _two_part_dot(p, values, values.dtype),)
            elif v_in_codes:
                sums = _with_coded(
                    sums, p, v, bh, first - v_first,
                    V_SCHEME, V_BITS, V_GROUP, V_MAGNITUDES, V_PAGE, V_D, V_WIDE, V_PADDED, N, DOT,
                )  # fmt: skip
            else:
                sums = _with_flat(
                    sums, p, v_flat, v_flat_first, v_flat_count, bh, token, V_D, V_WIDE, V_PADDED
                )

    splits = tl.num_programs(0)
    row = (bh * QUERIES + head) * splits + split
    tl.store(extent + row * 2, largest, mask=asks)
    tl.store(extent + row * 2 + 1, total, mask=asks)
    part = tl.arange(0, V_PADDED)
    for g in tl.static_range((V_D + V_WIDE - 1) // V_WIDE):
        inside = asks[:, None] & ((part < V_WIDE) & (g * V_WIDE + part < V_D))[None, :]
        tl.store(partial + row[:, None] * V_D + g * V_WIDE + part[None, :], sums[g], mask=inside)


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
    split = tl.arange(0, SPLITS)
    places = extent + (row * splits + split) * 2
    largest = tl.max(tl.load(places, mask=split < splits, other=float("-inf")), 0)
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
