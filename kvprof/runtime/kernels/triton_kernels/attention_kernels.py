"""The kernels that attend straight to packed codes: one splits the tokens, one adds the splits up.

Device code of Triton's; `attention` beside this file launches it and says how the tokens are cut. Does not know layers,
nor when a token is quantized.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvprof.runtime.kernels.triton_kernels.arithmetic import (
    CHANNEL,
    FULL,
    LOG2_E,
    ROTATED,
    TOKEN,
    exact_dot,
    hadamard,
    rounded_to,
    two_part_dot,
)
from kvprof.runtime.kernels.triton_kernels.codes import (
    PAGE_COLUMNS,
    code_numbers,
    code_source,
    column_channels,
    open_page,
)


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
def _largest_scales(opened, SCHEME: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, PADDED_PAGE: tl.constexpr):
    """Return the largest scale of each group of channels in a page; 1 where the scales are by channel, or all 0."""
    _, scale_at, _, tokens = opened
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
    levels,
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
    codes_at, scale_at, zero_at, tokens = opened
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    GROUPS: tl.constexpr = (D + WIDE - 1) // WIDE
    row = tl.minimum(place + tl.arange(0, N), tokens - 1)
    source = code_source(codes_at + row * (D * BITS // 8), D, BITS, IN_WORDS)
    scores = tl.zeros((q[0].shape[0], N), tl.float32)
    for g in tl.static_range(GROUPS):
        numbers = code_numbers(source, levels, D, g * WIDE, WIDE, PADDED, SCHEME, BITS, MAGNITUDES, IN_WORDS, DOT)
        if SCHEME == CHANNEL:
            channel, inside = column_channels(D, 0, D, PADDED, IN_WORDS)
            unit = place // GROUP * D + channel
            scale = tl.load(scale_at + unit, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zero_at + unit, mask=inside, other=0.0).to(tl.float32) + scale * MIDDLE
            scores += two_part_dot(q[0] * scale[None, :], tl.trans(numbers), DOT)
            scores += tl.sum(q[0] * zero[None, :], 1)[:, None]
        else:
            scale = tl.load(scale_at + row * GROUPS + g).to(tl.float32)
            scores += two_part_dot(q[g], tl.trans(numbers), DOT) * scale[None, :]
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
    levels,
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
    codes_at, scale_at, zero_at, tokens = opened
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    GROUPS: tl.constexpr = (D + WIDE - 1) // WIDE
    row = tl.minimum(place + tl.arange(0, N), tokens - 1)
    source = code_source(codes_at + row * (D * BITS // 8), D, BITS, IN_WORDS)
    added, shifted = (), ()
    for g in tl.static_range(GROUPS):
        numbers = code_numbers(source, levels, D, g * WIDE, WIDE, PADDED, SCHEME, BITS, MAGNITUDES, IN_WORDS, DOT)
        offset = offsets[g]
        if SCHEME == CHANNEL:
            channel, inside = column_channels(D, 0, D, PADDED, IN_WORDS)
            unit = place // GROUP * D + channel
            scale = tl.load(scale_at + unit, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zero_at + unit, mask=inside, other=0.0).to(tl.float32) + scale * MIDDLE
            rounded = p.to(DOT)  # in both sums: where one value is far off, they all but cancel for the others
            total = sums[g] + exact_dot(rounded, numbers) * scale[None, :]
            total += tl.sum(rounded.to(tl.float32), 1)[:, None] * zero[None, :]
        else:
            scale = tl.load(scale_at + row * GROUPS + g).to(tl.float32)
            weights = p * (scale * (1.0 / largest[g]))[None, :]
            total = sums[g] + exact_dot(weights.to(DOT), numbers)
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
        channel, inside = column_channels(D, g * WIDE, WIDE, PADDED, IN_WORDS)
        values = _flat_numbers(numbers, first, count, bh, token, channel, inside, D)
        added = added + (sums[g] + two_part_dot(p, values, values.dtype),)
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
def _weighed(scores, largest, total, sums, offsets):
    """Return the weights (M, N) of a tile's scores, base 2, and the largest score and all sums with them in view.

    What was summed before shrinks to the scale of the largest score now; only `total` has this tile's weights in it.
    """
    now = tl.maximum(largest, tl.max(scores, 1))
    finite = tl.where(now == float("-inf"), 0.0, now)
    p, shrunk = tl.exp2(scores - finite[:, None]), tl.exp2(largest - finite)
    return p, now, total * shrunk[:, None] + p, _shrunk(sums, shrunk), _shrunk(offsets, shrunk)


@triton.jit
def _masked(scores, valid, mask, token, HAS_MASK: tl.constexpr):
    """Close tokens that are not of this program, or that the mask closes; add a mask of numbers, base 2."""
    if HAS_MASK == 1:
        valid = valid & (tl.load(mask + token, mask=valid, other=0) != 0)
    if HAS_MASK == 2:
        scores += tl.load(mask + token, mask=valid, other=0.0).to(tl.float32)[None, :] * LOG2_E
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
    k = (k_table, k_pages, k_rest, k_rest_scale, k_rest_zero, k_rest_tokens)
    v = (v_table, v_pages, v_rest, v_rest_scale, v_rest_zero, v_rest_tokens)

    channel = tl.arange(0, K_ALL)
    q_at = (bh * QUERIES + head)[:, None] * K_D
    exact = tl.load(q + q_at + channel[None, :], mask=asks[:, None] & (channel[None, :] < K_D), other=0.0)
    source = q_rotated if K_SCHEME == ROTATED else q
    whole = tl.load(source + q_at + channel[None, :], mask=asks[:, None] & (channel[None, :] < K_D), other=0.0)
    size = tl.max(tl.abs(whole.to(tl.float32)), 1)
    size = tl.where(size == 0, 1.0, size)
    unit_q = ()
    for g in tl.static_range((K_D + K_WIDE - 1) // K_WIDE):
        column, inside = column_channels(K_D, g * K_WIDE, K_WIDE, K_PADDED, K_IN_WORDS)
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
                k_opened = open_page(k, (begin - k_first) // K_PAGE, bh, K_SCHEME, K_BITS, K_GROUP, K_D, K_PAGE)
            if V_SCHEME != FULL:
                v_opened = open_page(v, (begin - v_first) // V_PAGE, bh, V_SCHEME, V_BITS, V_GROUP, V_D, V_PAGE)
                new = _largest_scales(v_opened, V_SCHEME, V_D, V_WIDE, V_PADDED_PAGE)
                sums, units = _counted_in(sums, units, new), new
            for tile in range(0, tl.cdiv(end - begin, N)):
                first = begin + tile * N
                token = first + tl.arange(0, N)
                if K_SCHEME == FULL:
                    keys = _paged_numbers(k_table, k_pages, k_rest, k_rest_tokens, bh, token, K_D, K_ALL, K_PAGE)
                    scores = exact_dot(exact, tl.trans(keys)) * factor
                else:
                    scores = size[:, None] * _coded_scores(
                        unit_q, k_opened, k_levels, (begin - k_first) % K_PAGE + tile * N,
                        K_SCHEME, K_BITS, K_GROUP, K_MAGNITUDES, K_D, K_WIDE, K_PADDED, K_IN_WORDS, N, DOT,
                    )  # fmt: skip
                scores = _masked(_capped(scores, cap, SOFTCAP), token < stop, mask, token, HAS_MASK)
                p, largest, total, sums, offsets = _weighed(scores, largest, total, sums, offsets)
                if V_SCHEME == FULL:
                    values = _paged_numbers(v_table, v_pages, v_rest, v_rest_tokens, bh, token, V_D, V_ALL, V_PAGE)
                    sums = (sums[0] + two_part_dot(p, values, values.dtype),)
                else:
                    sums, offsets = _with_coded(
                        sums, offsets, p, v_opened, v_levels, units, (begin - v_first) % V_PAGE + tile * N,
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
                scores = exact_dot(exact, tl.trans(keys)) * factor
            elif k_in_codes:
                opened = open_page(k, (first - k_first) // K_PAGE, bh, K_SCHEME, K_BITS, K_GROUP, K_D, K_PAGE)
                scores = size[:, None] * _coded_scores(
                    unit_q, opened, k_levels, (first - k_first) % K_PAGE,
                    K_SCHEME, K_BITS, K_GROUP, K_MAGNITUDES, K_D, K_WIDE, K_PADDED, K_IN_WORDS, N, DOT,
                )  # fmt: skip
            else:
                keys = _flat_numbers(k_flat, k_flat_first, k_flat_count, bh, token, channel, channel < K_D, K_D)
                scores = exact_dot(exact, tl.trans(keys)) * factor
            valid = (token >= low) & (token < high)
            scores = _masked(_capped(scores, cap, SOFTCAP), valid, mask, token, HAS_MASK)
            p, largest, total, sums, offsets = _weighed(scores, largest, total, sums, offsets)
            if V_SCHEME == FULL:
                values = _paged_numbers(v_table, v_pages, v_rest, v_rest_tokens, bh, token, V_D, V_ALL, V_PAGE)
                sums = (sums[0] + two_part_dot(p, values, values.dtype),)
            elif v_in_codes:
                opened = open_page(v, (first - v_first) // V_PAGE, bh, V_SCHEME, V_BITS, V_GROUP, V_D, V_PAGE)
                units = _largest_scales(opened, V_SCHEME, V_D, V_WIDE, V_PADDED_PAGE)
                sums, offsets = _with_coded(
                    _counted_in(sums, one, units), offsets, p, opened, v_levels, units, (first - v_first) % V_PAGE,
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
        column, inside = column_channels(V_D, g * V_WIDE, V_WIDE, V_PADDED, V_IN_WORDS)
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
        plain += hadamard(rotated, LOG_D) * tl.load(signs + column)[None, :] / ROOT_D
    plain = rounded_to(plain / tl.where(total == 0, 1.0, total), out.dtype.element_ty)
    tl.store(out + row * D + column[None, :], plain, mask=(column < D)[None, :])
