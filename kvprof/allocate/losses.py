"""What was measured of each format of each tensor: a plan's formats looked up in Scores, and what they add up to.

Reads Scores' `loss_increase` and a plan; writes losses in nats a token, the calibration's factor in them.
Does not know budgets, nor how formats are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from kvprof.allocate.assemble import tensors_of
from kvprof.allocate.budget import CachedTensor
from kvprof.errors import InvalidFile, Mismatch, UsageError
from kvprof.records.formats import Format, format_named
from kvprof.records.geometry import CacheGeometry, KVLayer, check_same_model
from kvprof.records.plan import BitPlan, TensorPlan
from kvprof.records.scores import LOSS_INCREASE, Scores
from kvprof.records.words import short_digest


@dataclass(frozen=True)
class PredictedLoss:
    """What one format of one tensor is predicted to cost a decoding model."""

    format: Format
    loss: float
    """Nats a token."""
    stderr: float | None
    """Its standard error over sequences."""
    samples: tuple[float, ...] | None
    """Each sequence's own loss."""
    by_source: tuple[tuple[str, float], ...] | None = None
    """Where texts were mixed: each dataset's name and the loss on its sequences alone."""
    effects: tuple[str, ...] | None = None
    """Each sequence's signed effects, block by block, as `records.effects.encode` has them."""


def storage(form: Format, head_dim: int | None) -> Hashable:
    """Return what two formats have in common exactly when they store the same: `int2g128` of 64 channels is `int2g64`.

    head_dim: None where unknown; no group is then taken to reach beyond a head.
    """
    if form.is_full:
        return "full"
    group = form.group_size
    if form.axis == "token" and head_dim is not None:
        group = min(group, head_dim)
    return (form.scheme, form.bits, group, form.axis, form.clip)


def planned_tensors(plan: BitPlan, geometry: CacheGeometry | None = None) -> list[CachedTensor]:
    """Return every tensor that a plan gives bits to, keys first; its own geometry serves where none is given."""
    geometry = geometry or plan.geometry
    shapes: dict[int, KVLayer | None] = {
        entry.layer: geometry.layers[entry.layer] if geometry else None for entry in plan.layers
    }
    return tensors_of(shapes)


def entries_of(plan: BitPlan, tensors: Sequence[CachedTensor]) -> list[TensorPlan]:
    """Return the plan's entry for each tensor."""
    layers = {entry.layer: entry for entry in plan.layers}
    return [layers[tensor.layer].tensor(tensor.name) for tensor in tensors]


def kl_factor(scores: Scores) -> float:
    """Return what predicted losses are multiplied by: measured over predicted KL of whole plans, 1 until calibrated."""
    return 1.0 if scores.kl_calibration is None else scores.kl_calibration.factor


def predicted_losses(scores: Scores, tensor: CachedTensor, head_dim: int | None = None) -> list[PredictedLoss]:
    """Return every format of a tensor that has a `loss_increase`, in file order; another runtime's are passed over.

    head_dim: serves where the tensor's own is unknown. Full precision is a format only where it was scored.
    Raises InvalidFile where the tensor has no `loss_increase`.
    """
    entry = scores.entry(tensor.layer)
    found = None if entry is None else entry.tensor(tensor.name)
    if found is None or not found.loss_increase:
        raise InvalidFile(
            f"these scores have no {LOSS_INCREASE} for the {tensor.word} of layer {tensor.layer}.\n"
            "  Measure it with `kvprof gradients` or `kvprof divergence`."
        )
    factor = kl_factor(scores)
    formats: dict[Hashable, PredictedLoss] = {}
    for name, loss in found.loss_increase.items():
        try:
            form = format_named(name, tensor.stored_as, tensor.head_dim or head_dim)
        except UsageError:
            continue
        samples = (found.loss_increase_samples or {}).get(name)
        stderr = (found.loss_increase_stderr or {}).get(name)
        if stderr is None and samples is not None:
            stderr = stderr_of_mean(samples)
        sources = found.loss_increase_by_source or {}
        measured = PredictedLoss(
            format=form,
            loss=factor * loss,
            stderr=None if stderr is None else factor * stderr,
            samples=None if samples is None else tuple(factor * sample for sample in samples),
            by_source=tuple((dataset, factor * losses[name]) for dataset, losses in sources.items() if name in losses)
            or None,
            effects=(found.loss_effects or {}).get(name),
        )
        formats.setdefault(storage(form, tensor.head_dim), measured)
    return list(formats.values())


def predicted_loss_as(
    tensor: CachedTensor, entry: TensorPlan, formats: Sequence[PredictedLoss]
) -> PredictedLoss | None:
    """Return what was measured of a plan's entry; full precision loses nothing; None where it was not scored.

    An entry that keeps a share of the recent past in full precision is no format that anybody scored.
    """
    wanted = storage(entry, tensor.head_dim)
    for measured in formats:
        if storage(measured.format, tensor.head_dim) == wanted:
            return measured if entry.recent_fraction == 0 or entry.is_full else None
    if entry.is_full:
        sequences = next((len(measured.samples) for measured in formats if measured.samples is not None), None)
        return PredictedLoss(entry, 0.0, 0.0, None if sequences is None else (0.0,) * sequences)
    return None


def predicted_loss_of(scores: Scores, tensor: CachedTensor, entry: TensorPlan) -> PredictedLoss | None:
    """Return what was measured of a plan's entry, as `predicted_loss_as`; raises as `predicted_losses` does."""
    # Written by hand, neither file may know the shapes; whoever rotates, though, says how wide a head is.
    head_dim = entry.group_size if entry.scheme == "rotated" else None
    return predicted_loss_as(tensor, entry, predicted_losses(scores, tensor, head_dim))


def fitting_scores(plan: BitPlan, scores: Scores) -> Scores:
    """Return scores for the layers that a plan covers; raise Mismatch, saying how, where they are of another model."""
    fingerprint = None if scores.model is None else scores.model.fingerprint
    if scores.geometry is not None:
        plan.check_fits(scores.geometry, fingerprint)
        return scores.leaving(plan.reasons)
    if plan.geometry is not None:
        check_same_model("scores", scores.model, None, plan.geometry, plan.model.fingerprint)
    scored = {entry.layer for entry in scores.layers}
    lacking = [entry.layer for entry in plan.layers if entry.layer not in scored]
    problem = None
    if lacking:
        problem = f"they lack layer {lacking[0]}, which the plan gives bits to"
    elif max(scored) >= plan.model.num_layers:
        problem = f"they score layer {max(scored)}, the plan's model has {plan.model.num_layers} layers"
    elif None not in (plan.model.fingerprint, fingerprint) and plan.model.fingerprint != fingerprint:
        problem = f"their fingerprint is {short_digest(fingerprint)}, the plan's {short_digest(plan.model.fingerprint)}"
    if problem is not None:
        raise Mismatch(f"the scores are of another model: {problem}.\n  Name scores of the plan's own model.")
    return scores


def window_remark(name: str, plan: BitPlan, scores: Scores) -> str | None:
    """Return that a plan's window is not the one that the scores were measured with, where that is so."""
    if scores.decoding is None or scores.decoding.window == plan.window:
        return None
    measured, own = scores.decoding.window, plan.window
    return (
        f"the scores speak of {measured.sink_tokens} sinks and a window of {measured.recent_tokens}, {name} has "
        f"{own.sink_tokens} and {own.recent_tokens}: its predicted KL is for the scores' window"
    )


def sum_of_samples(parts: Sequence[PredictedLoss]) -> tuple[float, ...] | None:
    """Return each sequence's loss over all parts, or None where one part has no samples or another number of them."""
    columns = [part.samples for part in parts]
    known = [column for column in columns if column is not None]
    if len(known) < len(columns) or len({len(column) for column in known}) != 1:
        return None
    return tuple(map(total, zip(*known, strict=True)))


def total(losses: Iterable[float]) -> float:
    """Return a sum; raises InvalidFile where it is beyond a float."""
    try:
        return math.fsum(losses)
    except OverflowError:
        raise InvalidFile(f"{LOSS_INCREASE} is too large to add up; measure it again.") from None


def stderr_of_mean(samples: Sequence[float]) -> float | None:
    """Return the standard error of the mean of one number a sequence; None for a single sequence."""
    number = len(samples)
    if number < 2:
        return None
    mean = math.fsum(sample / number for sample in samples)
    return math.dist(samples, [mean] * number) / math.sqrt((number - 1) * number)


def stderr_of_sum(parts: Sequence[PredictedLoss]) -> float | None:
    """Return the standard error of a sum of parts taken as independent; None where one part's is unknown."""
    errors = [part.stderr for part in parts]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if known and len(known) == len(errors) else None
