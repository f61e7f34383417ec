"""How far apart are two predictions of the same text? KL divergence, top-1 agreement, negative log likelihood.

Pure functions of logits, token by token. Does not know models, plans or positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Logits taken at a time: 85 tokens of a vocabulary of 49,152, 16 MiB in float32."""
SOFTMAXES = 12
"""As long as which comparing the logits of two forwards takes: divergence, agreement and likelihood."""

LOGIT_ROUNDING_NATS = {"bfloat16": 1e-3, "float16": 1.6e-5}
"""Nats a token that rounding both logits to a dtype can add to a KL: the demo model's reach 44, where the numbers of
bfloat16 are 1/4 apart, and with noise added to them 0.00034 nats read as 0.0011, 0.0039 as 0.0049. It goes with the
square of the distance."""


def token_kl(reference_TV: Tensor, planned_TV: Tensor) -> Tensor:
    """Return KL(reference || planned) of each token's next-token distribution, in nats.

    reference_TV, planned_TV: logits, (T, V), any float dtype; computed in float32, of float64 logits in float64.
    Returns (T,), float64, on the CPU, never negative; NaN where logits are not finite.
    """
    widest = torch.float32 if reference_TV.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    parts = []
    for reference, planned in _chunks(reference_TV, planned_TV):
        log_p, log_q = reference.log_softmax(-1), planned.log_softmax(-1)
        p, apart = log_p.exp(), log_p - log_q
        # sum of p log(p / q) + q - p: the sums of p and q, 1 each, cancel; with them, so does the rounding of the two
        # normalisers, which would be larger than the KL of an 8-bit cache. A token that p rules out leaves q - p.
        terms = torch.expm1(-apart).add_(apart).mul_(p)
        ruled_out = p < torch.finfo(p.dtype).tiny
        parts.append(torch.where(ruled_out, log_q.exp_().sub_(p), terms).sum(-1, dtype=widest))
    return torch.cat(parts).cpu().double().clamp_min_(0.0)


def top1_agreement(reference_TV: Tensor, planned_TV: Tensor) -> Tensor:
    """Return whether both find the same next token the likeliest: logits (T, V) each, to (T,), bool."""
    return reference_TV.argmax(-1) == planned_TV.argmax(-1)


def token_nll(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return the negative log likelihood of each target, in nats.

    logits_TV: (T, V), any float dtype. targets_T: (T,), the token that follows each. Returns (T,), float64, on the CPU.
    """
    parts = []
    start = 0
    for (logits,) in _chunks(logits_TV):
        targets = targets_T[start : start + len(logits), None]
        parts.append(logits.logsumexp(-1) - logits.gather(-1, targets)[:, 0])
        start += len(logits)
    return torch.cat(parts).cpu().double()


def _chunks(*logits_TV: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors cut along T, widened to at least float32, a few tokens at a time."""
    tokens, vocabulary = logits_TV[0].shape
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, tokens, step):
        yield tuple(
            logits[start : start + step].to(torch.promote_types(logits.dtype, torch.float32)) for logits in logits_TV
        )
