"""What storing a layer's keys or values in a format changes of the loss to first order, for all formats of one layer.

Reads a layer's call to its attention and the gradient that arrives at its output; returns g . d of every query. That
number alone is wanted, so no format's attention output is ever made. Does not know models, nor files.

Let p_t be the exact weights of a query over tokens and learned sinks, o its output and g the gradient. A format of
values changes v_t by dv_t where the query reads t restored, and g . d = sum_t p_t (g . dv_t) is linear: one product of
the weights with the dv of all formats side by side. A format of keys changes the logits of these tokens alone, and so
p_t to p_t' before all are divided by their new sum:

    g . d = sum_t p_t' (g . v_t' - g . o) / sum_t p_t' = sum_t [p_t' (g . v_t' - g . o) - p_t (g . v_t - g . o)] / ...,

where g . v_t is computed once for all formats. v_t' is v_t, unless keys and values are made of one latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprof.profile.format_changes import Asked, Changes, LayerFormats, changes_of
from kvprof.runtime.attention.logits import AttentionLogits
from kvprof.runtime.attention.patch import AttentionCall

QUERIES_AT_ONCE = 64
"""Queries whose weights stand at a time. What any of them reads restored is computed for all: about as many tokens."""

CPU_WEIGHTS_AT_ONCE = 2**17
"""Weights that stand at a time, for each thread: with what is made of them they stay in its cache."""

GPU_WEIGHTS_AT_ONCE = 2**25

LEAST_LOGARITHM = -80.0
"""What the logarithm of a weight is raised to before exp: below -87 a processor takes 20 to 200 times as long for it,
and no float holds the difference from 1."""

LEAST_SUM = 1e-20
"""Of new weights: below it, those that LEAST_LOGARITHM raises may count."""


def format_effects(
    call: AttentionCall, wide: AttentionCall, logits: AttentionLogits, gradient: Tensor, asked: LayerFormats
) -> dict[Asked, Tensor]:
    """Return g . d of every format for the queries that are asked, (B, T - first) each, in float64.

    call: in whose dtype keys and values are rounded. wide: the call in the dtype to compute in, or the same one.
    logits: of the wide call. gradient: at the output, (B, T - first, query heads, D).
    Raises Mismatch, BeyondFormat.
    """
    rows, _, tokens, _ = wide.query.shape
    dots = {
        (tensor, name): torch.zeros(rows, tokens - asked.first, dtype=_widest(gradient), device=gradient.device)
        for tensor, name, _ in asked.formats
    }
    for row in range(rows):
        for outer, changes in changes_of(call, wide, row, asked):
            if not changes:
                continue
            for heads in _slabs(wide, outer):
                slab = _Slab(wide, logits, row, heads, gradient[row], asked.first)
                inner = slice(heads.start - outer.start, heads.stop - outer.start)
                own = [change.of_heads(inner) for change in changes]
                found = slab.effects(own, asked.window.sink_tokens, can_overflow=True)
                if not all(bool(series.isfinite().all()) for series in found.values()):
                    found = slab.effects(own, asked.window.sink_tokens, can_overflow=False)
                for name, series in found.items():
                    dots[name][row] += series
    return dots


def _slabs(call: AttentionCall, heads: slice) -> Iterator[slice]:
    """Yield the KV heads that are computed at a time."""
    query_heads, kv_heads, tokens = call.query.shape[1], call.key.shape[1], call.key.shape[2]
    on_cpu = call.query.device.type == "cpu"
    weights = CPU_WEIGHTS_AT_ONCE * torch.get_num_threads() if on_cpu else GPU_WEIGHTS_AT_ONCE
    step = max(1, weights // (query_heads // kv_heads * QUERIES_AT_ONCE * tokens))
    for start in range(heads.start, heads.stop, step):
        yield slice(start, min(heads.stop, start + step))


@dataclass(frozen=True)
class _Exact:
    """What some queries read in full precision; of each KV head, H in all, its G query heads times Q queries are rows.

    query: scaled, (H, G * Q, D). gradient: (H, G * Q, D). scores: capped, without biases, (H, G * Q, tokens); raw:
    before they are capped. log_weights, gains: log p_t and g . v_t - g . o, (H, G * Q, tokens). sinks: of the learned
    sinks these two numbers, (H, G * Q, 1) each, or None.
    """

    query: Tensor
    gradient: Tensor
    raw: Tensor
    scores: Tensor
    log_weights: Tensor
    gains: Tensor
    sinks: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class _Restored:
    """What a chunk of queries reads restored: N tokens, of which each query perhaps fewer.

    place: which tokens. log_weights: -inf where a query reads a token exact, (H, G * Q, N). weights: their exponential.
    gains: as `_Exact` has them. gain: sum over tokens of the weights times the gains, (H, G * Q).
    kept_log_weights, kept_gains: of what queries read exact, -inf where one reads it restored, (H, G * Q, others).
    """

    place: slice
    log_weights: Tensor
    weights: Tensor
    gains: Tensor
    gain: Tensor
    kept_log_weights: Tensor
    kept_gains: Tensor


@dataclass(frozen=True)
class _Slab:
    """Some KV heads of one sequence, and the gradient at what their queries read: (T - first, query heads, D)."""

    call: AttentionCall
    logits: AttentionLogits
    row: int
    heads: slice
    gradient: Tensor
    first: int

    def effects(self, groups: Sequence[Changes], sinks: int, can_overflow: bool) -> dict[Asked, Tensor]:
        """Return the sum over heads of g . d, (T - first,) of each format.

        can_overflow: whether effects come out as no finite number where new weights are beyond what the dtype holds, or
        all next to nothing; it is less work.
        """
        tokens = self.call.key.shape[2]
        names = [name for changes in groups for name in (*changes.value_names, *changes.key_names)]
        parts = []
        for start in range(self.first, tokens, QUERIES_AT_ONCE):
            queries = slice(start, min(tokens, start + QUERIES_AT_ONCE))
            exact = self._exact(queries)
            of_groups = [  # (H, G * Q, formats) each
                part
                for changes in groups
                for part in _chunk_effects(exact, self.logits, changes, queries, sinks, can_overflow)
            ]
            by_query = torch.unflatten(torch.cat(of_groups, dim=2), 1, (-1, queries.stop - start))  # (H, G, Q, formats)
            parts.append(by_query.sum((0, 1), dtype=_widest(by_query)))
        return dict(zip(names, torch.cat(parts).unbind(1), strict=True))

    def _exact(self, queries: slice) -> _Exact:
        call, logits = self.call, self.logits
        groups = call.query.shape[1] // call.key.shape[1]
        of_query = slice(self.heads.start * groups, self.heads.stop * groups)
        keys, values = (states[self.row, self.heads, : queries.stop] for states in (call.key, call.value))
        query = (call.query[self.row, of_query, queries] * logits.scaling).reshape(len(keys), -1, keys.shape[-1])
        here = slice(queries.start - self.first, queries.stop - self.first)
        gradient = self.gradient[here, of_query].transpose(0, 1).reshape(len(keys), -1, values.shape[-1])
        raw = query @ keys.mT
        scores = logits.capped(raw)
        by_head = (-1, queries.stop - queries.start, queries.stop)  # (query heads, Q, tokens)
        biased = scores.view(by_head) + logits.bias(self.row, of_query, queries, queries.stop)
        largest = biased.amax(-1, keepdim=True)
        sink = logits.sink(self.row, of_query, queries)
        if sink is not None:
            largest = largest.maximum(sink)
        log_weights = biased.sub_(largest)
        weights = _exp(log_weights.clone())
        total = weights.sum(-1, keepdim=True)
        if sink is not None:
            total = total + (sink - largest).exp_()
        output = weights.div_(total).view(scores.shape) @ values
        at_output = (gradient * output).sum(-1, keepdim=True)
        gains = (gradient @ values.mT).sub_(at_output)
        sinks = None
        if sink is not None:
            sinks = (sink - largest - total.log()).view(at_output.shape), -at_output
        log_weights = log_weights.sub_(total.log()).view(scores.shape)
        return _Exact(query, gradient, raw, scores, log_weights, gains, sinks)


def _chunk_effects(
    exact: _Exact, logits: AttentionLogits, changes: Changes, queries: slice, sinks: int, can_overflow: bool
) -> Iterator[Tensor]:
    """Yield g . d of the formats of values, and of those of keys, that are read alike: (H, G * Q, formats) each."""
    restored = _restored(exact, changes.counts[queries], sinks)
    if restored is None:
        yield exact.query.new_zeros(*exact.query.shape[:2], len(changes.value_names) + len(changes.key_names))
        return
    if changes.values is not None:
        number = restored.log_weights.shape[2]
        outputs = torch.unflatten(restored.weights @ changes.values[:, :number], -1, (len(changes.value_names), -1))
        yield outputs.mul_(exact.gradient[:, :, None]).sum(-1)
    if changes.keys:
        yield _key_effects(exact, logits, restored, changes, can_overflow)


def _restored(exact: _Exact, counts: Sequence[int], sinks: int) -> _Restored | None:
    """Return what queries read restored, of which each reads so many tokens; None where none of them reads any."""
    if not counts[-1]:
        return None
    place = slice(sinks, sinks + counts[-1])
    log_weights, gains = exact.log_weights[..., place], exact.gains[..., place]
    kept = [(exact.log_weights[..., part], exact.gains[..., part]) for part in (slice(sinks), slice(place.stop, None))]
    if exact.sinks is not None:
        kept.append(exact.sinks)
    if counts[0] < counts[-1]:
        device = gains.device
        read = torch.arange(counts[-1], device=device) < torch.tensor(counts, device=device)[:, None]  # (Q, N)
        by_query = torch.unflatten(log_weights, 1, (-1, len(counts)))
        turning = slice(counts[0], counts[-1])
        kept.append((_closed(by_query[..., turning], read[:, turning]).flatten(1, 2), gains[..., turning]))
        log_weights = _closed(by_query, ~read).flatten(1, 2)
    weights = _exp(log_weights.clone(memory_format=torch.contiguous_format))
    kept_log_weights, kept_gains = (torch.cat(parts, -1) for parts in zip(*kept, strict=True))
    return _Restored(place, log_weights, weights, gains, (weights * gains).sum(-1), kept_log_weights, kept_gains)


def _closed(log_weights: Tensor, closed: Tensor) -> Tensor:
    """Return logarithms of weights, (..., Q, N), -inf where `closed`, (Q, N)."""
    return log_weights + torch.zeros(closed.shape, dtype=log_weights.dtype, device=closed.device).masked_fill_(
        closed, -torch.inf
    )


def _exp(log_weights: Tensor) -> Tensor:
    """Return the exponential, computed in place."""
    return log_weights.clamp_(min=LEAST_LOGARITHM).exp_()


def _key_effects(
    exact: _Exact, logits: AttentionLogits, restored: _Restored, changes: Changes, can_overflow: bool
) -> Tensor:
    """Return g . d of the formats of keys, (H, G * Q, formats)."""
    number, place = restored.weights.shape[2], restored.place
    room = torch.empty_like(restored.weights)
    shape = (*room.shape[:2], len(changes.keys))
    # Of the new weights, over the tokens that are read restored, and over the others.
    sums, gains = room.new_empty(shape), room.new_empty(shape)
    kept_sums = _exp(restored.kept_log_weights.clone()).sum(-1, keepdim=True).expand(shape).contiguous()
    # Of the others the gains are minus those of the restored, before these change: no small difference of large sums.
    kept_gains = (-restored.gain)[..., None].expand(shape).contiguous()
    for at, (keys, values) in enumerate(zip(changes.keys, changes.of_latent, strict=True)):
        if logits.softcap is None:
            weights = torch.baddbmm(restored.log_weights, exact.query, keys[:, :number].mT, out=room)
        else:
            raw = torch.baddbmm(exact.raw[..., place], exact.query, keys[:, :number].mT, out=room)
            weights = logits.capped(raw).sub_(exact.scores[..., place]).add_(restored.log_weights)
        if not can_overflow:
            largest = weights.amax(-1, keepdim=True).maximum(restored.kept_log_weights.amax(-1, keepdim=True))
            weights.sub_(largest)
            kept = _exp(restored.kept_log_weights - largest)
            kept_sums[..., at], kept_gains[..., at] = kept.sum(-1), kept.mul_(restored.kept_gains).sum(-1)
        torch.sum(_exp(weights), -1, out=sums[..., at])
        gain = restored.gains
        if values is not None:
            gain = gain + exact.gradient @ values[:, :number].mT
        torch.sum(weights.mul_(gain), -1, out=gains[..., at])
    sums.add_(kept_sums)
    if can_overflow:
        sums.masked_fill_(sums < LEAST_SUM, torch.nan)
    return gains.add_(kept_gains).div_(sums)


def _widest(tensor: Tensor) -> torch.dtype:
    """Return float64, where a device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
