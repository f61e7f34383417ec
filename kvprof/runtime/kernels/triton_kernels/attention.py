"""Attend to packed codes through Triton's kernels: what they take, and how the tokens are cut for them.

Reads packed blocks where they lie, on a GPU or under Triton's interpreter on the CPU. Does not know layers, nor when a
token is quantized.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kvprof.runtime.history import PAGE_TOKENS, History, StoredTensor
from kvprof.runtime.kernels import torch_kernels
from kvprof.runtime.kernels.triton_kernels import attention_kernels
from kvprof.runtime.kernels.triton_kernels.arithmetic import LOG2_E
from kvprof.runtime.kernels.triton_kernels.forms import (
    Pages,
    ceil_div,
    magnitudes_of,
    next_power,
    on_device_of,
    page_tokens,
    read_in_words,
    refusal,
    rotated_tables,
    scheme_of,
)
from kvprof.runtime.quantization.rotation import rotation

OTHER_TILES = 4
"""Tiles of a split that is not of codes alone."""

MOST_SINGLE = 4096
"""Channels of float32 queries that share a KV head, at most."""

LEAST_TILES = 2
MOST_SPLITS = 128
"""Tiles of a split of codes at least, and such splits at most, so that beginning and merging them stay small parts."""


def why_not(query_BHqD: Tensor, history: History, mask: Tensor | None) -> str | None:
    """Return why the kernel does not attend to a history, or None where it does."""
    B, queries, asked, D = query_BHqD.shape
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
        return "the mask is not the same for all heads"
    if mask is not None and mask.shape[3] != history.key.shape[2]:
        return "the mask is not of as many tokens as there are"
    if query_BHqD.dtype == torch.float32 and next_power(queries // history.key.shape[1]) * D > MOST_SINGLE:
        return f"{queries // history.key.shape[1]} float32 queries of {D} channels are more than the registers hold"
    return None


def attend(
    query_BHqD: Tensor,
    history: History,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with the last token's query to all that is held, codes as they are packed; as `torch_kernels.attend`."""
    kind = (query_BHqD.device, query_BHqD.dtype, query_BHqD.shape[1:], history.key.form, history.value.form)
    if kind not in _too_large and why_not(query_BHqD, history, mask) is None:
        try:
            return _attend(query_BHqD, history, scaling, mask, softcap)
        except OutOfResources as error:  # of a GPU that is smaller than those which the tiles are made for
            _too_large.add(kind)
            torch_kernels.say_once(
                f"a query attends to unpacked keys and values: on {query_BHqD.device} the kernel is {error}"
            )
    return torch_kernels.attend(query_BHqD, history, scaling, mask, softcap)


_too_large: set[tuple[Any, ...]] = set()
"""What a GPU had no room for: it is not asked again."""


def _attend(query_BHqD: Tensor, history: History, scaling: float, mask: Tensor | None, softcap: float | None) -> Tensor:
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
    factor, cap = scaling * LOG2_E.value, 0.0
    if softcap is not None:
        factor, cap = scaling / softcap, softcap * LOG2_E.value
    partial = torch.empty(B * queries, cut.splits, value_D, dtype=torch.float32, device=device)
    extent = torch.empty(B * queries, cut.splits, 2, dtype=torch.float32, device=device)
    out = torch.empty(B, queries, 1, value_D, dtype=query_BHqD.dtype, device=device)
    exact = query_BHqD.dtype == torch.float32 or key.wide_scales or value.wide_scales
    with on_device_of(query_BHqD):
        attention_kernels.attend_splits[cut.splits, B * heads](
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
            M=max(16, next_power(queries // heads)),
            N=tile,
            STRETCH=math.gcd(key.page_tokens, value.page_tokens) or PAGE_TOKENS,
            V_PADDED_PAGE=next_power(value.page_tokens or 1),
            OTHER_TILES=OTHER_TILES,
            DOT=tl.float32 if exact else tl.float16,
            num_stages=2,
            # Three programs of 128 threads a multiprocessor, of 65,536 registers, hide each other's waits.
            maxnreg=168 if max(D, value_D) <= 128 else None,
            enable_fp_fusion=True,
        )
        turns = value.form.scheme == "rotated"
        attention_kernels.merge_splits[(B * queries,)](
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
            PADDED=next_power(value_D),
            SPLITS=max(2 * MOST_SPLITS, next_power(cut.splits)),
            AT_ONCE=16,
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
        self.page_tokens = 0 if form.is_full else page_tokens(form)
        pages = Pages(stored, device)
        sinks, recent = (_joined(blocks) for blocks in (stored.sinks, () if form.is_full else stored.recent))
        nothing = stored.like
        rotated = form.scheme == "rotated"
        self.signs, _, levels = rotated_tables(form.bits, head_dim, stored.quantizer.rotation_seed, device, rotated)
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
            f"{letter}_SCHEME": scheme_of(form),
            f"{letter}_BITS": form.bits,
            f"{letter}_GROUP": form.group_size,
            f"{letter}_MAGNITUDES": magnitudes_of(form, D),
            f"{letter}_PAGE": PAGE_TOKENS if form.is_full else page_tokens(form),
            f"{letter}_D": D,
            f"{letter}_WIDE": wide,
            f"{letter}_ALL": next_power(D),
            f"{letter}_PADDED": next_power(wide),
            f"{letter}_IN_WORDS": read_in_words(form, D),
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
        tiles = ceil_div(stop - start, tile)
        wanted = min(MOST_SPLITS, ceil_div(_programs(device), rows))
        self.main_tiles = max(LEAST_TILES, ceil_div(tiles, wanted))
        self.main = ceil_div(tiles, self.main_tiles)
        self.sinks = ceil_div(ceil_div(start, tile), OTHER_TILES)
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
    return 0 if low >= high else ceil_div(ceil_div(high, tile) - low // tile, OTHER_TILES)


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
