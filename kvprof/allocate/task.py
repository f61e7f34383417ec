"""What every rule starts from and ends with: the tensors to plan, and a plan of the formats chosen for them.

Reads Scores; writes a BitPlan with its costs and what it is predicted to lose. Does not know how formats are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from kvprof.allocate.assemble import assemble, tensors_of
from kvprof.allocate.budget import CachedTensor, Limit
from kvprof.allocate.measured import (
    Measured,
    kl_factor,
    measured_as,
    measured_formats,
    stderr_of_mean,
    stderr_of_sum,
    sum_of_samples,
    total,
)
from kvprof.errors import InvalidFile
from kvprof.records.document import ModelInfo
from kvprof.records.formats import Format
from kvprof.records.geometry import KVLayer
from kvprof.records.plan import USUAL_WINDOW, BitPlan, Provenance, Quantizer, Solver, TensorPlan, Window
from kvprof.records.scores import LOSS_INCREASE, Scores


def usual_window(
    scores: Scores, sink_tokens: int | None = None, recent_tokens: int | None = None, own: Window | None = None
) -> Window:
    """Return the window of a plan: what is asked for, else what the scores were measured with, else USUAL_WINDOW.

    own: of a runtime that the plan is for, instead of the latter two.
    """
    window = own or (USUAL_WINDOW if scores.decoding is None else scores.decoding.window)
    return window.with_tokens(sink_tokens, recent_tokens)


def without_sinks(window: Window) -> Window:
    """Return a window as the published rules have it: their papers know no sinks."""
    return window.model_copy(update={"sink_tokens": 0})


class PlanTask:
    """The tensors to plan, in the order that ties favour, and how a plan of them is put together."""

    def __init__(self, scores: Scores, window: Window | None = None, command: str | None = None) -> None:
        if scores.shard is not None:
            raise InvalidFile(
                f"these scores are shard {scores.shard.number} of {scores.shard.of}, of a part of the text alone.\n"
                "  Add them up first: kvprof merge, with the files of all shards."
            )
        self.scores = scores
        self.window = window or usual_window(scores)
        self.command = command
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
            measured_as(tensor, TensorPlan(**form.model_dump()), measured_formats(plain, tensor))
            for tensor, form in zip(self.tensors, formats, strict=True)
        ]
        parts = [measured for measured in found if measured is not None]
        if len(parts) < len(found):
            return Solver(method=method, metric=metric)
        return self.predicted(method, parts, optimal)

    def predicted(self, method: str, parts: Sequence[Measured], optimal: bool = False) -> Solver:
        """Return how a plan was found, with the KL divergence that its tensors' losses foretell.

        parts: each tensor's, not yet times the calibration's factor.
        """
        factor = kl_factor(self.scores)
        samples = sum_of_samples(parts)
        stderr = stderr_of_sum(parts) if samples is None else stderr_of_mean(samples)
        objective = total(part.loss for part in parts)
        kl, kl_stderr = factor * objective, None if stderr is None else factor * stderr
        if not math.isfinite(kl) or not math.isfinite(kl_stderr or 0.0):
            most = max(part.loss for part in parts)
            raise InvalidFile(f"{LOSS_INCREASE} reaches {most}, too large to add up; measure it again.")
        return Solver(
            method=method,
            metric=LOSS_INCREASE,
            objective=objective,
            optimal=optimal,
            predicted_kl_nats=kl,
            predicted_kl_stderr_nats=kl_stderr,
        )

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
            provenance=Provenance(scores=self.digest, command=self.command),
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
