"""What every rule starts from and ends with: the tensors to plan, and a plan of the formats chosen for them.

Reads Scores; writes a BitPlan with its costs and what it is predicted to lose. Does not know how formats are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from kvprof.allocate.assemble import assemble, tensors_of
from kvprof.allocate.budget import CachedTensor, Limit
from kvprof.allocate.co_moments import ScoredCoMoments, has_effects
from kvprof.allocate.losses import (
    PredictedLoss,
    kl_factor,
    predicted_loss_as,
    predicted_losses,
    total,
)
from kvprof.allocate.prediction import prediction_of
from kvprof.errors import InvalidFile
from kvprof.records.document import ModelInfo
from kvprof.records.formats import Format
from kvprof.records.geometry import KVLayer
from kvprof.records.plan import (
    USUAL_WINDOW,
    BitPlan,
    Provenance,
    Quantizer,
    Solver,
    TensorPlan,
    Window,
)
from kvprof.records.scores import LOSS_INCREASE, Scores


def usual_window(
    scores: Scores, sink_tokens: int | None = None, recent_tokens: int | None = None, own: Window | None = None
) -> Window:
    """Return the window of a plan: what is asked for, else what the scores were measured with, else USUAL_WINDOW.

    own: of a runtime that the plan is for, instead of the latter two. Scores of an earlier kvprof, which read every
    query's own token in full precision, keep that: a plan's window is the one that its prediction speaks of.
    """
    scored = None if scores.decoding is None else scores.decoding.window
    if own is not None and own.own_token_stored and scored == own.with_own_token_exact:
        own = scored
    window = own or scored or USUAL_WINDOW
    return window.with_tokens(sink_tokens, recent_tokens)


def without_sinks(window: Window) -> Window:
    """Return a window as the published rules have it: their papers know no sinks."""
    return window.model_copy(update={"sink_tokens": 0})


class Selection(NamedTuple):
    """What a plan that was chosen by some sequences is predicted to cost more on others, in nats a token."""

    nats: float
    stderr: float


class PlanTask:
    """The tensors to plan, in the order that ties favour, and how a plan of them is put together."""

    def __init__(self, scores: Scores, window: Window | None = None) -> None:
        if scores.shard is not None:
            raise InvalidFile(
                f"these scores are shard {scores.shard.number} of {scores.shard.of}, of a part of the text alone.\n"
                "  Add them up first: kvprof merge, with the files of all shards."
            )
        self.scores = scores
        self.window = window or usual_window(scores)
        self.tensors = _planned_tensors(scores)

    def scores_of(self, metric: str) -> list[float]:
        """Return the score of each tensor to plan."""
        found = {(layer, name): score for layer, name, score in self.scores.metric(metric)}
        return [found[tensor.layer, tensor.name] for tensor in self.tensors]

    def solver(self, method: str, metric: str | None, formats: Sequence[Format], optimal: bool = False) -> Solver:
        """Return how a plan was found, with the metric's objective for its formats, where the metric tells it."""
        if metric is None:
            return Solver(method=method)
        if metric != LOSS_INCREASE:
            objective = _objective(metric, self.scores_of(metric), formats)
            return Solver(method=method, metric=metric, objective=objective, optimal=optimal)
        plain = self.scores.model_copy(update={"kl_calibration": None})
        found = [
            predicted_loss_as(tensor, TensorPlan(**form.model_dump()), predicted_losses(plain, tensor))
            for tensor, form in zip(self.tensors, formats, strict=True)
        ]
        parts = [measured for measured in found if measured is not None]
        if len(parts) < len(found):
            return Solver(method=method, metric=metric)
        return self.predicted(method, parts, optimal)

    @cached_property
    def co_moments(self) -> ScoredCoMoments | None:
        """How the losses of formats add up, where the scores tell."""
        return ScoredCoMoments(self.scores, self.tensors) if has_effects(self.scores, self.tensors) else None

    def predicted(
        self,
        method: str,
        parts: Sequence[PredictedLoss],
        optimal: bool = False,
        lower_bound: float | None = None,
        selection: Selection | None = None,
    ) -> Solver:
        """Return how a plan was found, with the KL divergence that the effects of its tensors predict.

        parts: each tensor's, not yet times the calibration's factor. selection: of a plan that was chosen by the same
        sequences.
        """
        factor = kl_factor(self.scores)
        found = prediction_of(parts, None if self.co_moments is None else self.scores.effects, 1.0)
        assert found.kl_nats is not None
        added = 0.0 if selection is None else selection.nats
        errors = [found.stderr, None if selection is None else selection.stderr]
        stderr = None if found.stderr is None else math.hypot(*(error for error in errors if error is not None))
        kl, kl_stderr = factor * (found.kl_nats + added), None if stderr is None else factor * stderr
        if not math.isfinite(kl) or not math.isfinite(kl_stderr or 0.0):
            most = max(part.loss for part in parts)
            raise InvalidFile(f"{LOSS_INCREASE} reaches {most}, too large to add up; measure it again.")
        return Solver(
            method=method,
            metric=LOSS_INCREASE,
            objective=self.objective(parts),
            optimal=optimal,
            predicted_kl_nats=kl,
            predicted_kl_stderr_nats=kl_stderr,
            selection_nats=factor * added if selection is not None else None,
            kl_factor=factor if self.scores.kl_calibration is not None else None,
            lower_bound=None if optimal else lower_bound,
        )

    def objective(self, parts: Sequence[PredictedLoss]) -> float:
        """Return what `exact` makes the least of: the tensors' losses, with what they share where the scores tell."""
        if self.co_moments is not None:
            places = [
                self.co_moments.place(tensor, part.format) for tensor, part in zip(self.tensors, parts, strict=True)
            ]
            return self.co_moments.objective([place for place in places if place is not None])
        return total(part.loss for part in parts)

    def plan(self, formats: Sequence[Format], solver: Solver, limit: Limit | None = None) -> BitPlan:
        """Return the plan that stores each tensor in its format. limit: what was asked for."""
        return assemble(
            self.tensors,
            formats,
            model=self.model,
            geometry=self.scores.geometry,
            quantizer=Quantizer(),
            window=self.window,
            solver=solver,
            provenance=Provenance(scores=self.digest),
            limit=limit,
        )

    @cached_property
    def model(self) -> ModelInfo:
        """The scores' model; of scores that name none, as many layers as they speak of."""
        scores, geometry = self.scores, self.scores.geometry
        return scores.model or ModelInfo(num_layers=geometry.num_layers if geometry else len(scores.layers))

    @cached_property
    def digest(self) -> str:
        """The scores' digest: of a file that may have megabytes, so counted once for many plans."""
        return self.scores.digest


def _planned_tensors(scores: Scores) -> list[CachedTensor]:
    """Return the tensors of every layer to plan, in the order that ties favour."""
    if scores.geometry is None:
        shapes: dict[int, KVLayer | None] = {entry.layer: None for entry in scores.layers}
    else:
        shapes = {shape.layer: shape for shape in scores.geometry.planned}
    if not shapes:
        why = "" if scores.geometry is None else f"\n  {scores.geometry.reasons}"
        raise InvalidFile(f"every layer of this model is skipped, so there is nothing to give bits to.{why}")
    return tensors_of(shapes)


def _objective(metric: str, scores: Sequence[float], chosen: Sequence[Format]) -> float:
    """Return the sum of score^2 * 4^-bits."""
    objective = math.fsum(score * score * 4.0**-form.bits for score, form in zip(scores, chosen, strict=True))
    if not math.isfinite(objective):
        raise InvalidFile(f"{metric} reaches {max(scores)}, too large to square; rescale the scores.")
    return objective
