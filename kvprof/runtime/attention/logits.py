"""The logits of a call to a module's attention, which the module's own function computes and keeps to itself.

Reads what transformers' attention functions agree on: scaling, softcap, a mask and a bias that are added, and learned
sinks that share the softmax. A function that does anything else is told by its outputs. Does not know formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprof.runtime.attention.patch import AttentionCall
from kvprof.runtime.attention.reference import additive_mask, run_queries

TOLERANCE = 1e-3
"""Of the largest output: by more, a module's function does something else."""

LARGEST_ERROR = 2.0**-7
"""Of a logit, by which its dtype may round it: in float32, of one of 65,536."""


@dataclass(frozen=True)
class AttentionLogits:
    """What a call's softmax is taken of: softcap(scaling * query . key) + bias, and beside it the sinks.

    bias: added to the scores of each query, in parts of (B or 1, heads or 1, T, T) each. sinks: (B or 1, heads, T or 1,
    1), or None.
    """

    scaling: float
    softcap: float | None
    biases: tuple[Tensor, ...]
    sinks: Tensor | None

    def capped(self, scores: Tensor) -> Tensor:
        """Return scores as the softmax gets them, before a bias is added: a new tensor where there is a softcap."""
        return scores if self.softcap is None else (scores / self.softcap).tanh_().mul_(self.softcap)

    def bias(self, row: int, heads: slice, queries: slice, stop: int) -> Tensor:
        """Return what is added to a sequence's scores: (query heads or 1, queries, stop)."""
        parts = [
            part[row if part.shape[0] > 1 else 0, heads if part.shape[1] > 1 else slice(None), queries, :stop]
            for part in self.biases
        ]
        return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])

    def sink(self, row: int, heads: slice, queries: slice) -> Tensor | None:
        """Return the sinks of a sequence's queries: (query heads, queries or 1, 1), or None."""
        if self.sinks is None:
            return None
        own = self.sinks[row if self.sinks.shape[0] > 1 else 0, heads]
        return own if own.shape[1] == 1 else own[:, queries]


def logits_of(call: AttentionCall, position: int) -> AttentionLogits | None:
    """Return the logits of a call's attention; None where its outputs at a position are those of no such softmax.

    None too where logits may be so large that the dtype holds no difference of two: what moves one by little is lost.
    position: of a query that no sequence of the batch has padding at.
    """
    options = call.options
    scaling = options.get("scaling")
    bias = options.get("position_bias")
    mask = additive_mask(call.mask, call.key.shape[2], call.query)
    found = AttentionLogits(
        scaling=call.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=options.get("softcap"),
        biases=(mask,) if bias is None else (mask, bias),
        sinks=_sinks(call),
    )
    if not _can_differ(call, found.scaling):
        return None
    here = slice(position, position + 1)
    expected = run_queries(call, here)
    error = (_outputs(call, found, here) - expected).abs().max()
    return found if bool(error <= TOLERANCE * expected.abs().max()) else None


def _can_differ(call: AttentionCall, scaling: float) -> bool:
    """Whether the product of the longest query and the longest key is rounded by little; not where it is NaN."""
    query, key = (torch.linalg.vector_norm(states, dim=-1).max() for states in (call.query, call.key))
    return bool(query * abs(scaling) * key * torch.finfo(query.dtype).eps <= LARGEST_ERROR)


def _sinks(call: AttentionCall) -> Tensor | None:
    """Return learned logits that share the softmax: one a head (gpt-oss), or one a head and query (Inkling)."""
    given: Tensor | None = call.options.get("s_aux")
    if given is None:
        given = call.options.get("sinks")
    if given is None:
        return None
    sinks = given.detach().to(call.query.dtype)
    return sinks.reshape(1, -1, 1, 1) if sinks.dim() == 1 else sinks


def _outputs(call: AttentionCall, logits: AttentionLogits, queries: slice) -> Tensor:
    """Return what some queries read: (B, queries, heads, D)."""
    groups = call.query.shape[1] // call.key.shape[1]
    keys, values = (states[:, :, : queries.stop].repeat_interleave(groups, 1) for states in (call.key, call.value))
    scores = logits.capped(call.query[:, :, queries] @ keys.mT * logits.scaling)
    for bias in logits.biases:
        scores = scores + bias[:, :, queries, : queries.stop]
    tokens = scores.shape[-1]
    if logits.sinks is not None:
        sinks = logits.sinks if logits.sinks.shape[2] == 1 else logits.sinks[:, :, queries]
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., :tokens] @ values).transpose(1, 2)
