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

from kvprof.profile.format_changes import Asked, Changes, LayerFormats, ValueChanges, changes_of
from kvprof.runtime.attention.logits import AttentionLogits
from kvprof.runtime.attention.patch import AttentionCall

QUERIES_AT_ONCE = 48
"""Queries whose weights stand at a time. What any of them reads restored is computed for all: about as many tokens."""

CPU_WEIGHTS_AT_ONCE = 2**19
"""Weights that stand at a time, for each thread: with what is made of them they stay in its cache."""

GPU_WEIGHTS_AT_ONCE = 2**25

LEAST_LOGARITHM = -80.0
"""What a weight's logarithm is raised to before exp: below -87 a processor takes 20 to 200 times as long for it."""

NOTHING = 2e-35
"""A weight that is no more counts as none: it may have been raised so."""

MOST_TIMES = 1e20
LEAST_SUM = 1e-6
"""A format may make a single weight so many times as large, and the sum of all so small, and what counted as nothing
still does."""


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
    before they are capped. log_weights, weights, gains: log p_t, p_t and g . v_t - g . o, (H, G * Q, tokens). sinks: of
    the learned sinks these three numbers, (H, G * Q, 1) each, or None.
    """

    query: Tensor
    gradient: Tensor
    raw: Tensor
    scores: Tensor
    log_weights: Tensor
    weights: Tensor
    gains: Tensor
    sinks: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True)
class _Restored:
    """What a chunk of queries reads restored: N tokens, of which each query perhaps fewer.

    place: which tokens. unread: which of them each query reads exact, (Q, N), or None where all read all. weighing: of
    each token its weight, 0 where it is unread, weight times gain, and 1: (H * G * Q, 3, N). kept: the weights of all
    that is read exact, (H * G * Q, 1).
    """

    exact: _Exact
    place: slice
    unread: Tensor | None
    weighing: Tensor
    kept: Tensor

    @property
    def weights(self) -> Tensor:
        """The weights, (H, G * Q, N)."""
        heads = len(self.exact.gains)
        return self.weighing[:, 0].view(heads, -1, self.weighing.shape[2])

    def log_weights(self) -> Tensor:
        """Return the logarithm of the weights, -inf where a token is unread: (H, G * Q, N)."""
        found = self.exact.log_weights[..., self.place]
        return found if self.unread is None else _filled(found.clone(), self.unread, -torch.inf)

    def kept_apart(self) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the weight, and the gain, of all that is read exact: (H, G * Q, tokens) each.

        The logarithm is -inf where a token is read restored.
        """
        log_weights, gains = self.exact.log_weights.clone(), self.exact.gains
        restored = log_weights[..., self.place]
        if self.unread is None:
            restored.fill_(-torch.inf)
        else:
            _filled(restored, ~self.unread, -torch.inf)
        if self.exact.sinks is None:
            return log_weights, gains
        return torch.cat([log_weights, self.exact.sinks[0]], -1), torch.cat([gains, self.exact.sinks[2]], -1)


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
        parts = []
        for start in range(self.first, tokens, QUERIES_AT_ONCE):
            queries = slice(start, min(tokens, start + QUERIES_AT_ONCE))
            exact = self._exact(queries)
            restored = {counts: _restored(exact, counts[queries], sinks) for counts in {one.counts for one in groups}}
            found = [
                _chunk_effects(exact, self.logits, restored[changes.counts], changes, can_overflow)
                for changes in groups
            ]  # (H, G * Q, formats) each
            by_query = torch.unflatten(torch.cat(found, dim=2), 1, (-1, queries.stop - start))
            parts.append(by_query.sum((0, 1), dtype=_widest(by_query)))  # (Q, formats)
        names = [name for changes in groups for name in changes.names]
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
        weights = torch.threshold_(weights.div_(total), NOTHING, 0.0).reshape(scores.shape)
        at_output = (gradient * (weights @ values)).sum(-1, keepdim=True)
        gains = (gradient @ values.mT).sub_(at_output)
        log_weights = log_weights.sub_(total.log()).reshape(scores.shape)
        sinks = None
        if sink is not None:
            log_sinks = (sink - largest - total.log()).reshape(at_output.shape)  # sinks may lie in any order
            sinks = log_sinks, log_sinks.exp(), -at_output
        return _Exact(query, gradient, raw, scores, log_weights, weights, gains, sinks)


def _chunk_effects(
    exact: _Exact, logits: AttentionLogits, restored: _Restored | None, changes: Changes, can_overflow: bool
) -> Tensor:
    """Return g . d of formats that are read alike, for a chunk of queries: (H, G * Q, formats)."""
    if restored is None:
        return exact.query.new_zeros(*exact.query.shape[:2], len(changes.names))
    if isinstance(changes, ValueChanges):
        return _value_effects(exact, restored, changes)
    tokens, formats = restored.weighing.shape[2], len(changes.names)
    moved = exact.query @ changes.keys[..., : tokens * formats]
    moved = moved.view(*moved.shape[:2], tokens, formats)  # (H, G * Q, N, formats), of the logits
    if logits.softcap is not None:
        raw, scores = (both[..., restored.place, None] for both in (exact.raw, exact.scores))
        moved = logits.capped(moved.add_(raw)).sub_(scores)
    more = None
    if changes.values is not None:
        more = (exact.gradient @ changes.values[..., : tokens * formats]).view(moved.shape)
    return (_key_effects if can_overflow else _key_effects_of_any_size)(restored, moved, more)


def _value_effects(exact: _Exact, restored: _Restored, changes: ValueChanges) -> Tensor:
    outputs = restored.weights @ changes.values[:, : restored.weighing.shape[2]]  # (H, G * Q, formats * D)
    by_format = torch.unflatten(outputs, 2, (len(changes.names), -1))
    return by_format.mul_(exact.gradient[:, :, None]).sum(-1)


def _key_effects(restored: _Restored, moved: Tensor, more: Tensor | None) -> Tensor:
    """Return g . d of formats of keys: (H, G * Q, formats); NaN where weights may overflow, or nothing count.

    moved: what a format adds to logits; overwritten. more: what it adds to gains, or None; (H, G * Q, N, formats) both.
    """
    times = moved.exp_().flatten(0, 1)  # as large as before
    sums, gains, most = (restored.weighing @ times).unbind(1)  # (H * G * Q, formats) each
    if more is not None:
        gains = gains + (restored.weighing[:, :1] @ times.mul_(more.flatten(0, 1)))[:, 0]
    sums = sums + restored.kept
    # Of what is kept the gains are minus those of the others before: so small changes are no difference of large sums.
    effects = (gains - restored.weighing[:, 1].sum(-1, keepdim=True)) / sums
    effects.masked_fill_((most > MOST_TIMES) | (sums < LEAST_SUM), torch.nan)
    return effects.view(*moved.shape[:2], -1)


def _key_effects_of_any_size(restored: _Restored, moved: Tensor, more: Tensor | None) -> Tensor:
    """Do as `_key_effects` does, by weights of which the largest is 1."""
    kept, kept_gains = (of_kept[..., None] for of_kept in restored.kept_apart())
    log_weights = moved.add_(restored.log_weights()[..., None])
    largest = log_weights.amax(2, keepdim=True).maximum(kept.amax(2, keepdim=True))
    weights, kept = _exp(log_weights.sub_(largest)), _exp(kept - largest)
    gains = restored.exact.gains[..., restored.place, None]
    sums = weights.sum(2) + kept.sum(2)
    of_restored = weights.mul_(gains if more is None else more.add_(gains)).sum(2)
    return (of_restored + kept.mul_(kept_gains).sum(2)) / sums


def _restored(exact: _Exact, counts: Sequence[int], sinks: int) -> _Restored | None:
    """Return what queries read restored, of which each reads so many tokens; None where none of them reads any."""
    number = counts[-1]
    if not number:
        return None
    place = slice(sinks, sinks + number)
    gains = exact.gains[..., place]
    weighing = gains.new_empty(*gains.shape[:2], 3, number)
    weights, weighted, ones = weighing.unbind(2)
    weights.copy_(exact.weights[..., place])
    kept = exact.weights[..., :sinks].sum(-1) + exact.weights[..., place.stop :].sum(-1)
    if exact.sinks is not None:
        kept = kept + exact.sinks[1].squeeze(-1)
    unread = None
    if counts[0] < number:
        device = gains.device
        unread = torch.arange(number, device=device) >= torch.tensor(counts, device=device)[:, None]  # (Q, N)
        turning = slice(counts[0], number)
        kept = kept + _filled(weights[..., turning].clone(), ~unread[:, turning], 0.0).sum(-1)
        _filled(weights[..., turning], unread[:, turning], 0.0)
    torch.mul(weights, gains, out=weighted)
    ones.fill_(1.0)
    return _Restored(exact, place, unread, weighing.flatten(0, 1), kept.view(-1, 1))


def _filled(numbers: Tensor, where: Tensor, filling: float) -> Tensor:
    """Fill some of the numbers of queries, (H, G * Q, N), in place. where: (Q, N)."""
    torch.unflatten(numbers, 1, (-1, len(where))).masked_fill_(where, filling)
    return numbers


def _exp(log_weights: Tensor) -> Tensor:
    """Return the exponential, computed in place."""
    return log_weights.clamp_(min=LEAST_LOGARITHM).exp_()


def _widest(tensor: Tensor) -> torch.dtype:
    """Return float64, where a device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
