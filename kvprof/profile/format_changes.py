"""What formats change of the keys and values that a layer's queries read: restored minus exact, of one sequence.

Reads a layer's call to its attention. Does not know the loss, nor its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.plan import Quantizer, TensorPlan, Window
from kvprof.runtime.attention.patch import AttentionCall
from kvprof.runtime.attention.reference import restored_tokens, tokens_in_codes

NUMBERS_AT_ONCE = 2**25
"""Numbers that changes may hold at a time, 128 MiB in float32: of longer texts those of fewer heads, or formats."""

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
class Changes:
    """What formats that are read alike change of the first N tokens after the sinks, of some KV heads.

    counts: how many of these tokens each query reads restored: T numbers, ascending.
    keys: what each format of keys changes, (H, N, D). of_latent: what it changes of values that are made of the same
    latent, (H, N, D), or None.
    values: what the formats of values change, side by side: (H, N, formats * D), or None where there are none.
    """

    counts: tuple[int, ...]
    key_names: tuple[Asked, ...]
    keys: tuple[Tensor, ...]
    of_latent: tuple[Tensor | None, ...]
    value_names: tuple[Asked, ...]
    values: Tensor | None

    def of_heads(self, heads: slice) -> Changes:
        """Return the changes of some of the heads."""
        return replace(
            self,
            keys=tuple(keys[heads] for keys in self.keys),
            of_latent=tuple(None if values is None else values[heads] for values in self.of_latent),
            values=None if self.values is None else self.values[heads],
        )


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
    keys: dict[tuple[int, ...], list[tuple[Asked, Tensor, Tensor | None]]] = {}
    values: dict[tuple[int, ...], list[tuple[Asked, Tensor]]] = {}
    for tensor, name, form in asked.formats:
        counts = tokens_in_codes(form, asked.window, call.key.shape[2])
        if not counts[-1]:
            continue
        restored, exact = _restored(call, row, heads, asked, tensor, form, counts[-1])
        if call.latents is not None:
            changed, of_latent = _expanded(wide, row, restored, tensor, asked.window.sink_tokens)
            keys.setdefault(counts, []).append(((tensor, name), changed, of_latent))
            continue
        changed = (restored.to(wide.query.dtype) - exact.to(wide.query.dtype))[0]
        if tensor == "key":
            keys.setdefault(counts, []).append(((tensor, name), changed, None))
        else:
            values.setdefault(counts, []).append(((tensor, name), changed))
    groups = []
    for counts in {**keys, **values}:
        of_keys, of_values = keys.get(counts, []), values.get(counts, [])
        groups.append(
            Changes(
                counts,
                tuple(name for name, _, _ in of_keys),
                tuple(changed for _, changed, _ in of_keys),
                tuple(of_latent for _, _, of_latent in of_keys),
                tuple(name for name, _ in of_values),
                torch.cat([changed for _, changed in of_values], dim=2) if of_values else None,
            )
        )
    return groups


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
