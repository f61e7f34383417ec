"""The cache's three operations through Triton's kernels: what they take, and how the work is cut for them.

Reads packed blocks where they lie, on a GPU or under Triton's interpreter on the CPU. What the kernels do not take is
done by `torch_kernels`. Does not know layers, nor when a token is quantized.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from kvprof.records.formats import Format
from kvprof.records.plan import Quantizer
from kvprof.runtime import torch_kernels, triton_kernels
from kvprof.runtime.history import PAGE_TOKENS, CodeBlock, History, StoredTensor
from kvprof.runtime.packing import packed_bytes
from kvprof.runtime.quantizer import CLIP_FRACTIONS, exact_levels, level_edges, rotation, rotation_signs, unit_tokens

LOG2_E = math.log2(math.e)

OTHER_TILES = 4
"""Tiles of a split that is not of codes alone."""

LEAST_TILES = 2
MOST_SPLITS = 128
"""Tiles of a split of codes at least, and such splits at most, so that beginning and merging them stay small parts."""

INTERPRETED = bool(triton_kernels.INTERPRETED.value)
"""Whether the kernels run under Triton's interpreter, on the CPU too."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(form: Format, head_dim: int, dtype: torch.dtype) -> str | None:
    """Return why the kernels do not take keys or values in a format, or None where they do."""
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not among float16, bfloat16 and float32"
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"heads of {head_dim} channels are not of 16 to 256, a multiple of 8"
    if form.is_full or (form.axis == "token" and form.group_size >= head_dim) or form.group_size % 16 == 0:
        return None
    return f"groups of {form.group_size} are no multiple of 16"


def _in_words(form: Format, head_dim: int) -> bool:
    """Whether codes are read in words of 32 bits: rows and groups must be of powers of two that are large enough."""
    group = min(form.group_size, head_dim) if form.axis == "token" else head_dim
    powers = _power(head_dim) == head_dim and _power(group) == group
    return not form.is_full and powers and head_dim >= 32 and group >= head_dim // 8


def pack_tokens(x_BHTD: Tensor, form: Format, quantizer: Quantizer) -> CodeBlock:
    """Quantize tokens, (B, H, T, D), T a multiple of the tokens in a unit, and pack their codes."""
    B, H, T, D = x_BHTD.shape
    if refusal(form, D, x_BHTD.dtype):
        return torch_kernels.pack_tokens(x_BHTD, form, quantizer)
    x_BHTD = x_BHTD if x_BHTD.stride(3) == 1 else x_BHTD.contiguous()

    def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(B, H, rows, columns, dtype=dtype, device=x_BHTD.device)

    scale_dtype, zero_dtype = (getattr(torch, name) for name in (quantizer.scale_dtype, quantizer.zero_dtype))
    codes = empty(T, packed_bytes(D, form.bits), torch.uint8)
    shape = (T, H, *x_BHTD.stride()[:3])
    with _device(x_BHTD):
        if form.scheme == "rotated":
            scale, zero, rows = empty(T, 1, scale_dtype), None, max(1, 512 // D)
            signs, edges, _ = _rotated_tables(form.bits, D, quantizer.rotation_seed, x_BHTD.device)
            triton_kernels.pack_rotated[B * H, _ceil(T, rows)](
                x_BHTD,
                signs,
                edges,
                codes,
                scale,
                *shape,
                ROOT_D=math.sqrt(D),
                LOG_D=D.bit_length() - 1,
                BITS=form.bits,
                SCALE_MAX=torch.finfo(scale_dtype).max,
                ROWS=rows,
                enable_fp_fusion=False,
            )
            return CodeBlock(codes, scale, zero)
        group, by_channel = form.group_size, form.axis == "channel"
        if by_channel:
            units, channels, rows, columns = T // group, D, _power(group), min(32, _power(D))
            grid = (B * H, units)
        else:
            group = min(group, D)
            units, channels, rows, columns = T, _ceil(D, group), 16, _power(group)
            grid = (B * H, _ceil(T, rows))
        scale, zero = empty(units, channels, scale_dtype), empty(units, channels, zero_dtype)
        triton_kernels.pack_groups[grid](
            x_BHTD,
            codes,
            scale,
            zero,
            *shape,
            D=D,
            ALL=_power(D),
            GROUP=group,
            BY_CHANNEL=by_channel,
            BITS=form.bits,
            FRACTIONS=CLIP_FRACTIONS[1:] if form.clip == "mse" else (),
            SCALE_MAX=torch.finfo(scale_dtype).max,
            ZERO_MAX=torch.finfo(zero_dtype).max,
            ROWS=rows,
            COLUMNS=columns,
            enable_fp_fusion=False,
        )
    return CodeBlock(codes, scale, zero)


def unpack_tokens(stored: StoredTensor, out_BHTD: Tensor) -> None:
    """Write what all codes stand for into (B, H, T, D), T the tokens in codes."""
    B, H, T, D = out_BHTD.shape
    if refusal(stored.form, D, out_BHTD.dtype) or out_BHTD.stride(3) != 1:
        torch_kernels.unpack_tokens(stored, out_BHTD)
        return
    form, page = stored.form, _page_tokens(stored.form)
    rows = 32
    rotated = form.scheme == "rotated"
    signs, _, levels = _rotated_tables(form.bits, D, stored.quantizer.rotation_seed, out_BHTD.device, rotated)
    wide = D if rotated or form.axis == "channel" else min(form.group_size, D)
    with _device(out_BHTD):
        pages = _Pages(stored, out_BHTD.device)
        full, rest = divmod(T, page)
        triton_kernels.unpack_rows[B * H, full * _ceil(page, rows) + _ceil(rest, rows)](
            *pages.arguments,
            signs,
            levels,
            out_BHTD,
            H,
            *out_BHTD.stride()[:3],
            SCHEME=_scheme(form),
            BITS=form.bits,
            GROUP=form.group_size,
            D=D,
            LOG_D=D.bit_length() - 1,
            ROOT_D=math.sqrt(D),
            PAGE=page,
            N=rows,
            WIDE=wide,
            PADDED=_power(wide),
            enable_fp_fusion=False,
        )


def why_not(query_BHqD: Tensor, history: History, mask: Tensor | None) -> str | None:
    """Return why the kernel does not attend to a history, or None where it does."""
    B, queries, asked, _ = query_BHqD.shape
    if asked != 1:
        return f"{asked} queries came at once"
    for stored in (history.key, history.value):
        if reason := refusal(stored.form, stored.shape[3], query_BHqD.dtype):
            return reason
        if stored.like.dtype != query_BHqD.dtype:
            return "queries and keys or values have different dtypes"
    if queries % history.key.shape[1] or queries // history.key.shape[1] > 64:
        return f"{queries} query heads share {history.key.shape[1]} KV heads"
    if mask is not None and (mask.shape[1:3] != (1, 1) or mask.shape[0] not in (1, B)):
        return f"a mask of shape {tuple(mask.shape)} is not the same for all heads"
    return None


def attend(
    query_BHqD: Tensor,
    history: History,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with the last token's query to all that is held, codes as they are packed; as `torch_kernels.attend`."""
    if why_not(query_BHqD, history, mask):
        return torch_kernels.attend(query_BHqD, history, scaling, mask, softcap)
    B, queries, _, D = query_BHqD.shape
    _, heads, tokens, value_D = history.value.shape
    device = query_BHqD.device
    query_BHqD = query_BHqD.contiguous()
    key, value = _Tensor(history.key, device), _Tensor(history.value, device)
    tile = _tile_tokens(key, value, query_BHqD.dtype)
    cut = _Cut(key, value, tokens, tile, B * heads, device)
    rotated = query_BHqD
    if key.form.scheme == "rotated":
        turn = rotation(D, key.quantizer.rotation_seed, torch.float32, device)
        rotated = (query_BHqD.float() @ turn.T) / math.sqrt(D)
    if mask is not None:
        mask = mask.expand(B, 1, 1, tokens).contiguous()
    factor, cap = scaling * LOG2_E, 0.0
    if softcap is not None:
        factor, cap = scaling / softcap, softcap * LOG2_E
    partial = torch.empty(B * queries, cut.splits, value_D, dtype=torch.float32, device=device)
    extent = torch.empty(B * queries, cut.splits, 2, dtype=torch.float32, device=device)
    out = torch.empty(B, queries, 1, value_D, dtype=query_BHqD.dtype, device=device)
    exact = query_BHqD.dtype == torch.float32 or key.wide_scales or value.wide_scales
    with _device(query_BHqD):
        triton_kernels.attend_splits[cut.splits, B * heads](
            query_BHqD,
            rotated,
            partial,
            extent,
            factor,
            cap,
            query_BHqD if mask is None else mask,
            0 if mask is None else tokens,
            *key.arguments,
            *value.arguments,
            key.first,
            value.first,
            key.coded_end,
            value.coded_end,
            *cut.arguments,
            HEADS=heads,
            QUERIES=queries // heads,
            HAS_MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
            SOFTCAP=softcap is not None,
            **key.constants("K"),
            **value.constants("V"),
            M=max(16, _power(queries // heads)),
            N=tile,
            STRETCH=math.gcd(key.page_tokens, value.page_tokens) or PAGE_TOKENS,
            V_PADDED_PAGE=_power(value.page_tokens or 1),
            OTHER_TILES=OTHER_TILES,
            DOT=triton_kernels.SINGLE if exact else triton_kernels.HALF,
            num_stages=2,
            # Three programs of 128 threads a multiprocessor, of 65,536 registers, hide each other's waits.
            maxnreg=168 if max(D, value_D) <= 128 else None,
            enable_fp_fusion=True,
        )
        turns = value.form.scheme == "rotated"
        triton_kernels.merge_splits[(B * queries,)](
            partial,
            extent,
            value.signs,
            out,
            cut.splits,
            cut.main,
            cut.sinks,
            cut.mixed,
            int(cut.values_late),
            ROTATED_VALUES=turns,
            ROOT_D=math.sqrt(value_D),
            LOG_D=value_D.bit_length() - 1,
            D=value_D,
            PADDED=_power(value_D),
            SPLITS=_power(cut.splits),
            AT_ONCE=min(16, _power(cut.splits)),
            enable_fp_fusion=True,
        )
    return out


class _Tensor:
    """Keys or values as the attention kernel gets them: pages, sinks, recent tokens, and what it is compiled for."""

    def __init__(self, stored: StoredTensor, device: torch.device) -> None:
        form, (_, _, tokens, head_dim) = stored.form, stored.shape
        self.form, self.quantizer, self.head_dim = form, stored.quantizer, head_dim
        self.first = 0 if form.is_full else stored.sink_tokens
        self.coded_end = tokens if form.is_full else self.first + stored.coded_tokens
        self.page_tokens = 0 if form.is_full else _page_tokens(form)
        pages = _Pages(stored, device)
        sinks, recent = (_joined(blocks) for blocks in (stored.sinks, () if form.is_full else stored.recent))
        nothing = stored.like
        rotated = form.scheme == "rotated"
        self.signs, _, levels = _rotated_tables(form.bits, head_dim, stored.quantizer.rotation_seed, device, rotated)
        self.arguments = (
            *pages.arguments,
            levels,
            nothing if sinks is None else sinks,
            nothing if recent is None else recent,
        )
        self.wide_scales = not form.is_full and stored.quantizer.scale_dtype == "bfloat16"

    def constants(self, letter: str) -> dict[str, Any]:
        form, D = self.form, self.head_dim
        wide = min(form.group_size, D) if form.axis == "token" and not form.is_full else D
        return {
            f"{letter}_SCHEME": _scheme(form),
            f"{letter}_BITS": form.bits,
            f"{letter}_GROUP": form.group_size,
            f"{letter}_MAGNITUDES": _magnitudes(form, D),
            f"{letter}_PAGE": PAGE_TOKENS if form.is_full else _page_tokens(form),
            f"{letter}_D": D,
            f"{letter}_WIDE": wide,
            f"{letter}_ALL": _power(D),
            f"{letter}_PADDED": _power(wide),
            f"{letter}_IN_WORDS": _in_words(form, D),
        }


class _Cut:
    """How the tokens are cut: four runs of them, in as many splits as keep the device busy.

    start, stop: where keys and values both lie in pages. late: up to where one of them does.
    """

    def __init__(self, key: _Tensor, value: _Tensor, tokens: int, tile: int, rows: int, device: torch.device) -> None:
        start = max(key.first, value.first)
        stop = max(start, min(key.coded_end, value.coded_end))
        coded = [tensor.coded_end for tensor in (key, value) if not tensor.form.is_full]
        late = max([stop, *coded])
        self.keys_late = stop < late == key.coded_end and not key.form.is_full
        self.values_late = stop < late == value.coded_end and not value.form.is_full
        tiles = _ceil(stop - start, tile)
        wanted = min(MOST_SPLITS, _ceil(_programs(device), rows))
        self.main_tiles = max(LEAST_TILES, _ceil(tiles, wanted))
        self.main = _ceil(tiles, self.main_tiles)
        self.sinks = _ceil(_ceil(start, tile), OTHER_TILES)
        self.mixed = _splits(stop - start, late - start, tile)
        self.splits = self.main + self.sinks + self.mixed + _splits(late - start, tokens - start, tile)
        self.arguments = (
            start,
            stop,
            late,
            tokens,
            self.main,
            self.main_tiles,
            self.sinks,
            self.mixed,
            int(self.keys_late),
            int(self.values_late),
        )


def _splits(low: int, high: int, tile: int) -> int:
    """Return the splits of tokens low to high, whose tiles begin at multiples of a tile."""
    return 0 if low >= high else _ceil(_ceil(high, tile) - low // tile, OTHER_TILES)


def _tile_tokens(key: _Tensor, value: _Tensor, dtype: torch.dtype) -> int:
    """Return the tokens that a program reads at once: of one group, and of one page, of keys and of values."""
    tile = 64 if dtype != torch.float32 and max(key.head_dim, value.head_dim) <= 128 else 32
    for form in (key.form, value.form):
        if form.axis == "channel" and not form.is_full:
            tile = math.gcd(tile, form.group_size)
    return tile


def _programs(device: torch.device) -> int:
    """Return how many programs keep a device busy: three a multiprocessor at once, and some five times over.

    So the last ones to end leave little of it idle.
    """
    if device.type != "cuda":
        return 4
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count


def _joined(blocks: tuple[Tensor, ...]) -> Tensor | None:
    if not blocks:
        return None
    return (torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]).contiguous()


class _Pages:
    """A tensor's pages and the rest behind them, as kernels are given them."""

    def __init__(self, stored: StoredTensor, device: torch.device) -> None:
        if stored.form.is_full:
            blocks: list[tuple[Tensor, ...]] = [(block,) for block in stored.recent]
            page = PAGE_TOKENS
            held = [block.shape[2] for block in stored.recent]
        else:
            blocks, page = [block.tensors for block in stored.coded], _page_tokens(stored.form)
            held = [block.units * stored.unit_tokens for block in stored.coded]
        full = len(blocks) if not held or held[-1] == page else len(blocks) - 1
        assert all(tokens == page for tokens in held[:full])
        self.rest_tokens = held[-1] if full < len(blocks) else 0
        assert self.rest_tokens < page
        self.table = stored.addresses.of(blocks[:full], device)
        rest = blocks[-1] if full < len(blocks) else blocks[0] if blocks else (stored.like,)
        codes, scale, zero = (rest[min(index, len(rest) - 1)] for index in range(3))
        self.arguments = (self.table, full, codes, scale, zero, self.rest_tokens)


def _page_tokens(form: Format) -> int:
    unit = unit_tokens(form)
    return _ceil(PAGE_TOKENS, unit) * unit


def _scheme(form: Format) -> Any:
    if form.is_full:
        return triton_kernels.FULL
    if form.scheme == "rotated":
        return triton_kernels.ROTATED
    return triton_kernels.CHANNEL if form.axis == "channel" else triton_kernels.TOKEN


@functools.cache
def _magnitudes(form: Format, head_dim: int) -> tuple[int, ...]:
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


@functools.lru_cache(maxsize=256)
def _rotated_tables(
    bits: int, head_dim: int, seed: int, device: torch.device, used: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rotation's signs, the edges between levels in float64, and the levels in float32."""
    if not used:
        nothing = torch.empty(1, device=device)
        return nothing, nothing, nothing
    signs = rotation_signs(head_dim, seed).to(device=device, dtype=torch.float32)
    levels = exact_levels(bits, head_dim).to(device=device, dtype=torch.float32)
    return signs, level_edges(bits).to(device), levels


def _device(tensor: Tensor) -> Any:
    """Return a context in which kernels are launched on a tensor's device."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)  # -1: where there is none, nothing changes


def _power(count: int) -> int:
    """Return the smallest power of two that is no smaller."""
    return 1 << (count - 1).bit_length()


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
