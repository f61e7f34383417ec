"""Every tensor of a plan with what it has and all that it could have, by one metric.

Reads a plan and Scores; writes choices with their losses, nats a token or units of the metric's own.
Does not know budgets or prices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import mode

from kvprof.allocate.budget import CachedTensor
from kvprof.allocate.candidates import USUAL_BITS, USUAL_GROUP_SIZE, candidates_of
from kvprof.allocate.hull import Point
from kvprof.allocate.losses import (
    PredictedLoss,
    entries_of,
    kl_factor,
    planned_tensors,
    predicted_loss_of,
    storage,
)
from kvprof.allocate.scored import every_format
from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.records.formats import TENSORS, usual_format
from kvprof.records.plan import BitPlan, TensorPlan
from kvprof.records.scores import LOSS_INCREASE, METRICS, Scores


@dataclass(frozen=True)
class Case:
    """One tensor: what it has, and all that it could have."""

    tensor: CachedTensor
    entry: TensorPlan
    choices: tuple[PredictedLoss, ...]
    chosen: PredictedLoss | None
    """One of the choices; None where the plan's format was not scored."""

    def bits(self, choice: PredictedLoss) -> Fraction:
        """Return the stored bits of an element."""
        return choice.format.stored_bits(self.tensor.head_dim)

    @property
    def points(self) -> list[Point]:
        """Each choice's stored bits of all elements of a token, and its loss."""
        return [(self.bits(choice) * self.tensor.width, choice.loss) for choice in self.choices]


def cases_of(plan: BitPlan, scores: Scores, metric: str, formats: str | None = None) -> list[Case]:
    """Return every tensor of a plan that the scores fit.

    formats: what may be chosen besides what the plan has, as `parse_formats` reads it; by default all that was scored,
    other runtimes' formats only where the plan has such.
    A metric that knows no formats could have every usual width, in the group size of most tensors of the same name.
    Raises UsageError for a metric or formats that there are not, InvalidFile for scores that lack the metric.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}: {did_you_mean(metric, METRICS)}")
    tensors = planned_tensors(plan, scores.geometry)
    entries = entries_of(plan, tensors)
    chosen: list[PredictedLoss | None]
    if metric == LOSS_INCREASE:
        factor = kl_factor(scores)
        if formats is None and any(entry.is_external for entry in entries):
            formats = every_format(scores)
        offered = [
            [_times(choice, factor) for choice in choices]
            for choices in candidates_of(scores, tensors, metric, {"formats": formats})
        ]
        chosen = [predicted_loss_of(scores, tensor, entry) for tensor, entry in zip(tensors, entries, strict=True)]
    else:
        if formats is not None:
            raise UsageError(f"{metric} knows no formats, so --formats would change nothing; leave it out.")
        score_of = {(layer, name): score for layer, name, score in scores.metric(metric)}
        squares = [_square(score_of[tensor.layer, tensor.name], metric) for tensor in tensors]
        offered = _usual_widths(tensors, entries, squares)
        chosen = [
            PredictedLoss(entry, square * 4.0**-entry.bits, None, None)
            for entry, square in zip(entries, squares, strict=True)
        ]
    return [_case(*parts) for parts in zip(tensors, entries, offered, chosen, strict=True)]


def _case(
    tensor: CachedTensor, entry: TensorPlan, offered: Sequence[PredictedLoss], chosen: PredictedLoss | None
) -> Case:
    """Return a case whose choices hold the chosen one, once."""
    own = None if chosen is None else storage(chosen.format, tensor.head_dim)
    others = [choice for choice in offered if storage(choice.format, tensor.head_dim) != own]
    return Case(tensor, entry, (*others, *([chosen] if chosen is not None else [])), chosen)


def _times(choice: PredictedLoss, factor: float) -> PredictedLoss:
    return replace(
        choice,
        loss=factor * choice.loss,
        stderr=None if choice.stderr is None else factor * choice.stderr,
        samples=None if choice.samples is None else tuple(factor * sample for sample in choice.samples),
    )


def _square(score: float, metric: str) -> float:
    if not math.isfinite(score * score):
        raise InvalidFile(f"{metric} reaches {score}, too large to square; rescale the scores.")
    return score * score


def _usual_widths(
    tensors: Sequence[CachedTensor], entries: Sequence[TensorPlan], squares: Sequence[float]
) -> list[list[PredictedLoss]]:
    """Return the usual widths, in the group size that most tensors of the same name have."""
    groups: dict[str, list[int]] = {name: [] for name in TENSORS}
    for tensor, entry in zip(tensors, entries, strict=True):
        if not entry.is_full:
            groups[tensor.name].append(entry.group_size)
    group_of = {name: mode(found or [USUAL_GROUP_SIZE]) for name, found in groups.items()}
    return [
        [
            PredictedLoss(
                usual_format(tensor.stored_as, bits, group_of[tensor.name], tensor.head_dim),
                square * 4.0**-bits,
                None,
                None,
            )
            for bits in USUAL_BITS
        ]
        for tensor, square in zip(tensors, squares, strict=True)
    ]
