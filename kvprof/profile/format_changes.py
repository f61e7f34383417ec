"""What formats change of the keys and values that a layer's queries read: restored minus exact, of one sequence.

Reads a layer's call to its attention. Does not know the loss, nor its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.plan import Quantizer, TensorPlan, Window
from kvprof.runtime.attention.patch import AttentionCall
from kvprof.runtime.attention.reference import restored_tokens, tokens_in_codes

NUMBERS_AT_ONCE = 2**25
"""Numbers that changes may hold at a time, 128 MiB in float32: of longer texts those of fewer heads, or formats."""

FORMATS_AT_ONCE = 8
"""Formats of keys whose weights are computed at a time."""

Asked = tuple[TensorName, str]
"""A tensor, and the name of a format."""


@dataclass(frozen=True)
class LayerFormats:
    """The formats to ask of one layer, and how its cache is read.

    formats: (tensor, name, how it is stored). first: the queries before it are left out.
    """

    formats: Sequence[tuple[TensorName, str, TensorPlan]]
    window: Window
    quantizer: Quantizer
    first: int


@dataclass(frozen=True)
class ValueChanges:
    """What formats that are read alike change of the values of the first N tokens after the sinks, of H KV heads.

    counts: how many of these tokens each query reads restored: T numbers, ascending.
    values: restored minus exact, the formats side by side: (H, N, formats * D).
    """

    names: tuple[Asked, ...]
    counts: tuple[int, ...]
    values: Tensor

    def of_heads(self, heads: slice) -> ValueChanges:
        """Return the changes of some of the heads."""
        return replace(self, values=self.values[heads])


@dataclass(frozen=True)
class KeyChanges:
    """What formats change of keys, as `ValueChanges` has it of values.

    keys: (H, D, N * formats), a token's formats side by side. values: what formats of latents change of the values
    that are made of these too, (H, D, N * formats), or None.
    """

    names: tuple[Asked, ...]
    counts: tuple[int, ...]
    keys: Tensor
    values: Tensor | None = None

    def of_heads(self, heads: slice) -> KeyChanges:
        """Return the changes of some of the heads."""
        return replace(self, keys=self.keys[heads], values=None if self.values is None else self.values[heads])


Changes = ValueChanges | KeyChanges


def changes_of(
    call: AttentionCall, wide: AttentionCall, row: int, asked: LayerFormats
) -> Iterator[tuple[slice, list[Changes]]]:
    """Yield KV heads of a sequence and what formats change of them, of as many as may stand at a time.

    call: in whose dtype keys and values are rounded. wide: the same in the dtype to compute in.
    """
    kv_heads, tokens = wide.key.shape[1:3]
    channels = {"key": wide.key.shape[3], "value": wide.value.shape[3]}
    by_latent = call.latents is not None
    numbers = [tokens * (sum(channels.values()) if by_latent else channels[tensor]) for tensor, *_ in asked.formats]
    # A latent makes the keys and values of all heads at once.
    heads_at_once = kv_heads if by_latent else max(1, NUMBERS_AT_ONCE // sum(numbers))
    formats_at_once = max(1, NUMBERS_AT_ONCE // (min(heads_at_once, kv_heads) * max(numbers)))
    for start in range(0, kv_heads, heads_at_once):
        heads = slice(start, min(kv_heads, start + heads_at_once))
        for first in range(0, len(asked.formats), formats_at_once):
            formats = asked.formats[first : first + formats_at_once]
            yield heads, _grouped(call, wide, row, heads, replace(asked, formats=formats))


def _grouped(call: AttentionCall, wide: AttentionCall, row: int, heads: slice, asked: LayerFormats) -> list[Changes]:
    """Return what formats change, those together that are read alike; what is never read restored is left out."""
    groups: dict[tuple[Any, ...], list[tuple[Asked, Tensor | None, Tensor | None]]] = {}
    for tensor, name, form in asked.formats:
        counts = tokens_in_codes(form, asked.window, call.key.shape[2])
        if not counts[-1]:
            continue
        restored, exact = _restored(call, row, heads, asked, tensor, form, counts[-1])
        keys: Tensor | None = None
        values: Tensor | None = None
        if call.latents is not None:
            keys, values = _expanded(wide, row, restored, tensor, asked.window.sink_tokens)
        elif tensor == "key":
            keys = (restored.to(wide.query.dtype) - exact.to(wide.query.dtype))[0]
        else:
            values = (restored.to(wide.query.dtype) - exact.to(wide.query.dtype))[0]
        groups.setdefault((counts, keys is None, values is None), []).append(((tensor, name), keys, values))
    return [
        _together(counts, changed[start : start + FORMATS_AT_ONCE])
        for (counts, *_), changed in groups.items()
        for start in range(0, len(changed), FORMATS_AT_ONCE)
    ]


def _together(counts: tuple[int, ...], changed: Sequence[tuple[Asked, Tensor | None, Tensor | None]]) -> Changes:
    names, keys, values = zip(*changed, strict=True)
    if keys[0] is None:
        return ValueChanges(names, counts, torch.cat(values, dim=2))
    beside = None if values[0] is None else _side_by_side(values)
    return KeyChanges(names, counts, _side_by_side(keys), beside)


def _side_by_side(changed: Sequence[Tensor]) -> Tensor:
    """Return changes of (H, N, D) each as (H, D, N * formats)."""
    return torch.stack([states.mT for states in changed], dim=3).flatten(2)


def _restored(
    call: AttentionCall,
    row: int,
    heads: slice,
    asked: LayerFormats,
    tensor: TensorName,
    form: TensorPlan,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return what is cached of some heads, or all of a latent, restored and exact: (1, H, count, D) each."""
    sinks = asked.window.sink_tokens
    states = call.cached[TENSORS.index(tensor)][row : row + 1, :, sinks : sinks + count]
    exact = states if call.latents is not None else states[:, heads]
    return restored_tokens(call.layer, tensor, form, asked.quantizer, exact), exact


def _expanded(
    wide: AttentionCall, row: int, restored: Tensor, tensor: TensorName, sinks: int
) -> tuple[Tensor, Tensor | None]:
    """Return what a latent that is restored changes of all heads' keys and values: (heads, N, D) each.

    Of the keys' rotary part, which is what stands for the values, no value is made.
    """
    assert wide.latents is not None
    place = slice(sinks, sinks + restored.shape[2])
    parts = [states[row : row + 1, :, place] for states in wide.cached]
    parts[TENSORS.index(tensor)] = restored.to(wide.query.dtype)
    keys, values = wide.latents.expand(*parts)
    changed = keys[0] - wide.key[row, :, place]
    return changed, values[0] - wide.value[row, :, place] if tensor == "key" else None
