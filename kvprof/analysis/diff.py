"""Two plans of one model side by side: which tensors moved, and what it does to bits, bytes and predicted KL.

Reads two BitPlans, and Scores where the predicted KL is to be counted again; writes a Comparison.
Does not know why a plan is as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvprof.allocate.budget import CachedTensor, spent
from kvprof.allocate.losses import (
    entries_of,
    planned_tensors,
    predicted_loss_of,
    stderr_of_mean,
    storage,
    window_remark,
)
from kvprof.allocate.prediction import Prediction, predict, unscored_remark
from kvprof.errors import Mismatch
from kvprof.records.comparison import Comparison, PlanCosts, SettingChange, TensorChange
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import BitPlan, Solver, TensorPlan
from kvprof.records.scores import Scores
from kvprof.records.words import short_digest


def compare(
    first: BitPlan, second: BitPlan, scores: Scores | None = None, names: tuple[str, str] = ("first", "second")
) -> Comparison:
    """Return how the second plan differs from the first.

    A geometry that only one of them carries serves both. scores: what both predicted KLs are counted from; without
    them each plan's own record is taken. names: what the plans are called in the result.
    Raises Mismatch where the plans, or the scores, are of different models; InvalidFile for scores without
    `loss_increase`.
    """
    _check_same_model(first, second, names)
    geometry = first.geometry or second.geometry or (scores.geometry if scores else None)
    predictions = None if scores is None else (predict(first, scores), predict(second, scores))
    tensors = planned_tensors(first, geometry)
    befores, afters = entries_of(first, tensors), entries_of(second, tensors)
    changes = tuple(
        _change(tensor, before, after, scores)
        for tensor, before, after in sorted(
            zip(tensors, befores, afters, strict=True), key=lambda row: (row[0].layer, row[0].name)
        )
        if not _same(tensor, before, after)
    )
    costs = [
        _costs(plan, name, tensors, geometry, None if predictions is None else predictions[place])
        for place, (plan, name) in enumerate(zip((first, second), names, strict=True))
    ]
    known = [cost.predicted_kl_nats for cost in costs if cost.predicted_kl_nats is not None]
    return Comparison(
        first=costs[0],
        second=costs[1],
        tensors=len(tensors),
        changes=changes,
        settings=tuple(_settings(first, second)),
        predicted_change_nats=known[1] - known[0] if len(known) == 2 else None,
        predicted_change_stderr_nats=None if predictions is None else _change_stderr(*predictions),
        remarks=(
            *_remarks(first, second, scores, predictions, names),
            *(_stale_remarks((first, second), costs, geometry, bool(changes)) if scores is None else ()),
        ),
    )


def _check_same_model(first: BitPlan, second: BitPlan, names: tuple[str, str]) -> None:
    """Raise Mismatch where two plans cannot be of one model, saying how they differ."""
    problem = None
    counts = (first.model.num_layers, second.model.num_layers)
    prints = (first.model.fingerprint, second.model.fingerprint)
    planned = [{entry.layer for entry in plan.layers} for plan in (first, second)]
    if counts[0] != counts[1]:
        problem = f"{names[0]} is for a model of {counts[0]} layers, {names[1]} for one of {counts[1]}."
    elif None not in prints and prints[0] != prints[1]:
        problem = f"{names[0]} is for the weights {short_digest(prints[0])}, {names[1]} for {short_digest(prints[1])}"
    elif planned[0] != planned[1]:
        layer = min(planned[0] ^ planned[1])
        has, lacks = names if layer in planned[0] else names[::-1]
        if layer in {**first.reasons, **second.reasons} and _slides(first, second, layer):
            raise Mismatch(
                f"{has} gives bits to layer {layer}, which slides; {lacks} leaves it alone.\n"
                "  kvprof diff compares plans that cover the same layers: give both the same --layers."
            )
        problem = f"{has} gives bits to layer {layer}, {lacks} skips it."
    else:
        try:
            if first.geometry is not None:
                second.check_fits(first.geometry)
            elif second.geometry is not None:
                first.check_fits(second.geometry)
        except Mismatch as error:
            problem = str(error).splitlines()[0]
    if problem is not None:
        raise Mismatch(f"these plans are not of one model. {problem}\n  kvprof diff compares two plans of one model.")


def _slides(first: BitPlan, second: BitPlan, layer: int) -> bool:
    shapes = [plan.geometry.layers[layer] for plan in (first, second) if plan.geometry is not None]
    return any(shape.window is not None for shape in shapes)


def _same(tensor: CachedTensor, before: TensorPlan, after: TensorPlan) -> bool:
    """Whether two entries store the same; what is in full precision anyway has no recent past to spare."""
    if before.is_full and after.is_full:
        return True
    alike = storage(before, tensor.head_dim) == storage(after, tensor.head_dim)
    return alike and before.recent_fraction == after.recent_fraction


def _change(tensor: CachedTensor, before: TensorPlan, after: TensorPlan, scores: Scores | None) -> TensorChange:
    predicted = None
    if scores is not None:
        was, now = predicted_loss_of(scores, tensor, before), predicted_loss_of(scores, tensor, after)
        predicted = None if was is None or now is None else now.loss - was.loss
    return TensorChange(
        layer=tensor.layer,
        tensor=tensor.word,
        before=before,
        after=after,
        stored_bits_before=float(before.stored_bits(tensor.head_dim)),
        stored_bits_after=float(after.stored_bits(tensor.head_dim)),
        predicted_change_nats=predicted,
    )


def _costs(
    plan: BitPlan,
    name: str,
    tensors: Sequence[CachedTensor],
    geometry: CacheGeometry | None,
    prediction: Prediction | None,
) -> PlanCosts:
    """Return what a plan costs, counted from its layers: a file edited by hand may still say what it cost before."""
    cost = spent(tensors, entries_of(plan, tensors), geometry)
    if prediction is not None:
        predicted, stderr = prediction.kl_nats, prediction.stderr
    elif plan.solver is not None:
        predicted, stderr = plan.solver.predicted_kl_nats, plan.solver.predicted_kl_stderr_nats
    else:
        predicted = stderr = None
    shaped = plan.model_copy(update={"geometry": geometry})
    return PlanCosts(
        name=name,
        nominal_bits=cost.nominal_bits,
        stored_bits=cost.stored_bits,
        bytes_per_token=cost.bytes_per_token,
        bytes_at=None if geometry is None else {context: shaped.bytes_at(context) for context in geometry.contexts},
        predicted_kl_nats=predicted,
        predicted_kl_stderr_nats=stderr,
    )


def _settings(first: BitPlan, second: BitPlan) -> list[SettingChange]:
    found = []
    for part in ("window", "quantizer"):
        before, after = getattr(first, part), getattr(second, part)
        for field in type(before).model_fields:
            was, now = getattr(before, field), getattr(after, field)
            if was != now:
                found.append(SettingChange(name=f"{part}.{field}", before=was, after=now))
    return found


def _change_stderr(first: Prediction, second: Prediction) -> float | None:
    """Return the standard error of the change, sequence by sequence: what is hard text for both cancels."""
    if first.samples is None or second.samples is None or len(first.samples) != len(second.samples):
        return None
    return stderr_of_mean([after - before for before, after in zip(first.samples, second.samples, strict=True)])


def _remarks(
    first: BitPlan,
    second: BitPlan,
    scores: Scores | None,
    predictions: tuple[Prediction, Prediction] | None,
    names: tuple[str, str],
) -> list[str]:
    """Return what a reader should know before trusting the difference."""
    remarks = []
    ids = (first.model.id, second.model.id)
    if None in (first.model.fingerprint, second.model.fingerprint) and None not in ids and ids[0] != ids[1]:
        remarks.append(f"the plans name different models ({ids[0]}, {ids[1]}), and their weights cannot be compared")
    if first.geometry and second.geometry and first.geometry.dtype != second.geometry.dtype:
        remarks.append(
            f"the plans say that the model is {first.geometry.dtype} and {second.geometry.dtype}; "
            f"bytes are counted for {first.geometry.dtype}"
        )
    for prediction, name in zip(predictions or (), names if predictions else (), strict=True):
        if prediction.unscored:
            remarks.append(unscored_remark(name, prediction.unscored))
    if scores is not None:
        windows = (window_remark(name, plan, scores) for plan, name in zip((first, second), names, strict=True))
        remarks += [remark for remark in windows if remark is not None]
    if scores is None and _predicts(first) and _predicts(second):
        if first.scores_digest != second.scores_digest:
            remarks.append("the two KLs were predicted from different scores; name one file for both with --scores")
        elif first.window != second.window:
            remarks.append("predicted KL does not know the window: it is that of the window that was scored")
        remarks += _factor_remarks((first, second), names)
    return remarks


def _factor_remarks(plans: Sequence[BitPlan], names: Sequence[str]) -> list[str]:
    """Return how the calibrated factors in two recorded predictions differ, or whose is not known."""
    was, now = (plan.solver for plan in plans)
    if was is None or now is None or was == now:
        return []
    # A ratio that is not known to be the factor, yet equals the other plan's, is it: by chance it would be another.
    one, other = _likely_factor(was), _likely_factor(now)
    if one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6):
        return []
    unknown = [name for solver, name in zip((was, now), names, strict=True) if solver.factor is None]
    if unknown:
        what = f"the calibrated factor in the KL that {' and '.join(unknown)} records is not known"
    else:
        what = f"the two KLs were predicted with different calibrated factors, {was.factor:.3g} and {now.factor:.3g}"
    return [f"{what}; --scores FILE counts both anew"]


def _likely_factor(solver: Solver) -> float | None:
    """Return the calibrated factor in a recorded prediction, or what it is if tensors share nothing."""
    if solver.factor is not None or solver.predicted_kl_nats is None or not solver.objective:
        return solver.factor
    return solver.predicted_kl_nats / solver.objective


def _stale_remarks(
    plans: Sequence[BitPlan], costs: Sequence[PlanCosts], geometry: CacheGeometry | None, moved: bool
) -> list[str]:
    """Return which plan's recorded KL is of what it was before somebody edited it."""
    again = "so one was edited since; --scores FILE counts them anew"
    for plan, cost in zip(plans, costs, strict=True):
        # Its own bits were averaged over its own shapes, which need not be those that both are counted with here.
        recorded = plan.budget.stored_bits if plan.budget and _shapes(plan.geometry) == _shapes(geometry) else None
        if _predicts(plan) and recorded is not None and not math.isclose(recorded, cost.stored_bits, rel_tol=1e-9):
            return [f"{cost.name} records {recorded:.4g} stored bits but has {cost.stored_bits:.4g}, {again}"]
    if moved and _predicts(plans[0]) and costs[0].predicted_kl_nats == costs[1].predicted_kl_nats:
        return [f"both plans record the same predicted KL though tensors moved, {again}"]
    return []


def _shapes(geometry: CacheGeometry | None) -> tuple[KVLayer, ...] | None:
    return None if geometry is None else geometry.layers


def _predicts(plan: BitPlan) -> bool:
    return plan.solver is not None and plan.solver.predicted_kl_nats is not None
