"""The KL divergence that a whole plan is predicted to cost.

Reads Scores and a plan; writes nats a token, the calibration's factor in them. Does not know budgets, nor how formats
are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kvprof.allocate.budget import CachedTensor
from kvprof.allocate.losses import (
    PredictedLoss,
    entries_of,
    fitting_scores,
    kl_factor,
    planned_tensors,
    predicted_loss_of,
    stderr_of_mean,
    stderr_of_sum,
    sum_of_samples,
    total,
)
from kvprof.records.plan import BitPlan, TensorPlan
from kvprof.records.scores import EffectBlocks, Scores


@dataclass(frozen=True)
class Prediction:
    """What a whole plan is predicted to cost a decoding model."""

    kl_nats: float | None
    """Nats a token; None where a tensor's format was not scored."""
    stderr: float | None
    """Its standard error over sequences, where known."""
    samples: tuple[float, ...] | None
    """Each sequence's own, where every tensor has them."""
    by_sequence: tuple[float, ...] | None
    """The same mean, dealt to the sequences by what their tensors lose each alone: less noisy than `samples`."""
    unscored: tuple[tuple[CachedTensor, TensorPlan], ...]
    """The tensors whose format was not scored."""


def predict(plan: BitPlan, scores: Scores) -> Prediction:
    """Return the KL that `loss_increase` predicts of a plan, times the calibrated factor.

    Effects of tensors are summed with their signs where the scores know them; else the tensors' losses are. Of a plan
    that was chosen by these very scores, this leaves out what the choice made of their noise (`Solver.selection_nats`).
    Raises as `fitting_scores` and `predicted_losses` do.
    """
    scores = fitting_scores(plan, scores)
    tensors = planned_tensors(plan, scores.geometry)
    found = [
        (tensor, entry, predicted_loss_of(scores, tensor, entry))
        for tensor, entry in zip(tensors, entries_of(plan, tensors), strict=True)
    ]
    unscored = tuple((tensor, entry) for tensor, entry, measured in found if measured is None)
    if unscored:
        return Prediction(None, None, None, None, unscored)
    return prediction_of(
        [measured for _, _, measured in found if measured is not None], scores.effects, kl_factor(scores)
    )


def predicted_kl(plan: BitPlan, scores: Scores) -> float | None:
    """Return the KL that scores predict of a plan, in nats a token; None where one of its formats was not scored.

    Of a plan that these very scores chose, what the choice made of their noise is in it. Raises as `predict` does.
    """
    found, solver = predict(plan, scores).kl_nats, plan.solver
    chosen = solver is not None and solver.selection_nats is not None and plan.scores_digest == scores.digest
    if found is None or not chosen:
        return found
    assert solver is not None
    return found + (solver.selection_nats or 0.0) * kl_factor(scores) / (solver.kl_factor or 1.0)


def prediction_of(parts: Sequence[PredictedLoss], effects: EffectBlocks | None, factor: float) -> Prediction:
    """Return what tensors stored in these formats cost together.

    parts: with the factor in their losses, not in their effects. effects: how the latter were added up, None where they
    are unknown.
    """
    summed = sum_of_samples(parts)
    if effects is not None and all(part.effects is not None or part.format.is_full for part in parts):
        samples = tuple(factor * sample for sample in coherent_samples(parts, effects))
        nats, alone = fmean(samples), fmean(summed) if summed else 0.0
        dealt = tuple(nats * one / alone for one in summed) if summed and alone else samples
        return Prediction(nats, stderr_of_mean(samples), samples, dealt, ())
    return Prediction(
        kl_nats=total(part.loss for part in parts),
        stderr=stderr_of_sum(parts) if summed is None else stderr_of_mean(summed),
        samples=summed,
        by_sequence=summed,
        unscored=(),
    )


def coherent_samples(parts: Sequence[PredictedLoss], effects: EffectBlocks) -> list[float]:
    """Return each sequence's KL of tensors stored together: of the sum of their effects, not the sum of their KLs."""
    from kvprof.records.long_run import effects_of, loss_of

    known = [effects_of(part.effects)[1] for part in parts if part.effects is not None]
    if not known:
        return [0.0] * len(effects.tokens)
    return [
        loss_of(sum(series[1:], start=series[0]), effects.bandwidth_blocks, tokens)
        for tokens, *series in zip(effects.tokens, *known, strict=True)
    ]


def unscored_remark(name: str, unscored: Sequence[tuple[CachedTensor, TensorPlan]]) -> str:
    """Return why the KL of the plan of this name cannot be predicted."""
    tensor, entry = unscored[0]
    recent = " with a recent_fraction" if entry.recent_fraction else ""
    more = f", nor the formats of {len(unscored) - 1} more tensors" if len(unscored) > 1 else ""
    return (
        f"the loss of {name} cannot be predicted: {entry.name}{recent} was not scored for the {tensor.word} "
        f"of layer {tensor.layer}{more}"
    )
