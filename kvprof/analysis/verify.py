"""Is a plan what its scores make of its request? Each thing that its file says, computed again and compared.

Reads a plan and Scores; returns Checks. Knows no model, no text and no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvprof import __version__
from kvprof.allocate.budget import CachedTensor, spent
from kvprof.allocate.dispatch import allocate_as_asked
from kvprof.allocate.losses import entries_of, fitting_scores, planned_tensors
from kvprof.allocate.task import PlanTask
from kvprof.analysis.recorded import ask_alike, read_command, read_request
from kvprof.errors import InvalidFile, KvprofError, Mismatch, first_line
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, Solver, TensorPlan
from kvprof.records.replies import Check
from kvprof.records.requests.plan import AllocateRequest
from kvprof.records.scores import METRICS, Scores
from kvprof.targets.registry import target_named

ROUNDING = 1e-9
"""Relative; what sums of the same numbers may differ by on another machine. On one machine they do not differ."""

MOST_CHARACTERS = 2000
"""Of a request that is printed."""

COSTS = ("nominal_bits", "stored_bits", "bytes_per_token")


def compared(name: str, said: object, found: object, note: str | None = None) -> Check:
    """Return the check of a value; of None, that the file does not say it."""
    if said is None:
        return unknown(name, "the file does not say")
    equal = said == found
    if isinstance(said, float) and isinstance(found, float):
        equal = math.isclose(said, found, rel_tol=ROUNDING)
    return Check(name=name, status="holds" if equal else "differs", said=_text(said), found=_text(found), note=note)


def unknown(name: str, why: str) -> Check:
    """Return that something cannot be checked."""
    return Check(name=name, status="unknown", note=why)


def verify_costs(plan: BitPlan) -> Iterator[Check]:
    """Count again what a plan costs, from its formats and its geometry, and yield whether it keeps its budget."""
    budget, tensors = plan.budget, planned_tensors(plan)
    counted = spent(tensors, entries_of(plan, tensors), plan.geometry)
    for name in COSTS:
        words = name.replace("_", " ")
        if name == "bytes_per_token" and plan.geometry is None:
            yield unknown(words, "the plan carries no geometry")
            continue
        said = None if budget is None else getattr(budget, name)
        yield compared(words, said, getattr(counted, name))
    yield _kept(plan, counted.nominal_bits, counted.stored_bits)


def verify_solution(plan: BitPlan, scores: Scores) -> Iterator[Check]:
    """Predict a plan's loss again, then solve its request again, and yield what that gives.

    scores: those that the plan says it was made from, or that are to stand for them.
    """
    yield compared("scores", plan.scores_digest, scores.digest)
    yield from _model(plan, scores)
    try:
        scores = fitting_scores(plan, scores)
        own = _as_the_plan_knew_them(plan, scores)
        task = PlanTask(own, plan.window)
        if {tensor.layer for tensor in task.tensors} != {entry.layer for entry in plan.layers}:
            raise Mismatch("the scores are of other layers.")
    except KvprofError as error:
        for name in ("predicted loss", "formats", "budget asked for", "window", "optimality"):
            yield unknown(name, first_line(error))
        return
    yield from _predicted(plan, task, None if own is scores else "before the scores were calibrated")
    yield from _solved(plan, own)


def verify_command(plan: BitPlan) -> Iterator[Check]:
    """Yield whether the command that readers see asks for what the plan's request says."""
    made = plan.provenance
    if made is None or made.request is None or made.command is None:
        return  # then it is the command that was solved again
    try:
        alike = ask_alike(made.request, read_command(made.command))
    except InvalidFile as error:
        yield unknown("command", first_line(error))
    else:
        asked = ", ".join(f"{name} {value}" for name, value in made.request.said().items())
        yield Check(
            name="command", status="holds" if alike else "differs", said=made.command, found=asked[:MOST_CHARACTERS]
        )


def verify_versions(plan: BitPlan, scores: Scores | None) -> Iterator[Check]:
    """Compare the versions of kvprof that wrote the files with this one."""
    yield compared("kvprof of the plan", plan.kvprof_version, __version__)
    if scores is not None:
        yield compared("kvprof of the scores", scores.kvprof_version, __version__)


def solve_again(plan: BitPlan, scores: Scores, request: AllocateRequest) -> BitPlan:
    """Return the plan that a request makes of scores; raises as `allocate` does."""
    runtime = None if request.target is None else target_named(request.target)
    return allocate_as_asked(scores, request, runtime, plan.provenance.command if plan.provenance else None)


def moved(before: BitPlan, after: BitPlan) -> list[tuple[CachedTensor, TensorPlan, TensorPlan]]:
    """Return the tensors to which two plans of the same layers give other formats."""
    tensors = planned_tensors(before)
    rows = zip(tensors, entries_of(before, tensors), entries_of(after, tensors), strict=True)
    return [row for row in rows if row[1] != row[2]]


def formats_compared(name: str, plan: BitPlan, solved: BitPlan) -> Check:
    """Return whether two plans give all tensors the same formats; of those that differ, the first."""
    changes = moved(plan, solved)
    total = 2 * len(plan.layers)
    if not changes:
        return Check(name=name, status="holds", said=f"{total} tensors", found=f"{total} tensors")
    tensor, said, found = changes[0]
    where = f"the {tensor.word} of layer {tensor.layer}"
    note = f"{len(changes)} of {total} tensors differ, {where} first"
    return Check(name=name, status="differs", said=_form(said), found=_form(found), note=note)


def geometry_compared(name: str, plan: BitPlan, found: CacheGeometry | None) -> Check:
    """Return whether a model caches what a plan says, layer by layer; of what differs, the first.

    Of sliding layers, the plan decides which are left alone.
    """
    said = plan.geometry
    if said is None or found is None:
        return unknown(name, f"the {'plan' if said is None else 'other file'} carries no geometry")
    found = found.leaving(plan.reasons)
    if said.dtype != found.dtype:
        return compared(name, said.dtype, found.dtype, "the dtype of the checkpoint")
    if len(said.layers) != len(found.layers):
        return compared(name, f"{len(said.layers)} layers", f"{len(found.layers)} layers")
    for one, other in zip(said.layers, found.layers, strict=True):
        for field in type(one).model_fields:
            before, after = getattr(one, field), getattr(other, field)
            if before != after:
                return compared(name, str(before), str(after), f"{field.replace('_', ' ')} of layer {one.layer}")
    return compared(name, f"{len(said.layers)} layers", f"{len(found.layers)} layers")


def _model(plan: BitPlan, scores: Scores) -> Iterator[Check]:
    """Yield whether a plan's model is that of its scores."""
    names = ("model of the scores", "model id of the scores", "architecture of the scores", "cache of the scores")
    if scores.model is None:
        for name in names:
            yield unknown(name, "the scores do not say which model they are of")
        return
    for name, field in zip(names, ("fingerprint", "id", "architecture"), strict=False):
        said, found = getattr(plan.model, field), getattr(scores.model, field)
        yield unknown(name, "the scores do not say") if found is None else compared(name, said, found)
    yield geometry_compared(names[-1], plan, scores.geometry)


def _as_the_plan_knew_them(plan: BitPlan, scores: Scores) -> Scores:
    """Return scores without the factor that they were given after the plan was made: its prediction shows that.

    Of scores with effects, every plan says its factor. Of scores without, older plans do not, but what was predicted is
    the factor times the objective.
    """
    solver = plan.solver
    if scores.kl_calibration is None or solver is None or solver.objective is None or solver.predicted_kl_nats is None:
        return scores
    raw = solver.kl_factor is None and (scores.effects is not None or solver.factor == 1.0)
    return scores.model_copy(update={"kl_calibration": None}) if raw else scores


def _kept(plan: BitPlan, nominal_bits: float | None, stored_bits: float | None) -> Check:
    """Return whether a plan costs no more than was asked for."""
    name, budget = "budget kept", plan.budget
    if budget is None or budget.requested is None or budget.unit is None:
        return unknown(name, "no budget was asked for")
    spends: float | None = nominal_bits if budget.unit == "nominal" else stored_bits
    if budget.unit == "bytes":
        try:
            request = read_request(plan)
            spends = float(plan.bytes_at(request.context or 0, request.batch or 1))
        except KvprofError as error:
            return unknown(name, f"at how many tokens is not known: {first_line(error)}")
    assert spends is not None
    status = "holds" if spends <= budget.requested else "differs"
    unit = budget.unit if budget.unit == "bytes" else f"{budget.unit} bits"
    return Check(name=name, status=status, said=f"at most {budget.requested:.15g} {unit}", found=f"{spends:.15g}")


def _predicted(plan: BitPlan, task: PlanTask, note: str | None) -> Iterator[Check]:
    """Yield whether a plan's own formats add up to the loss that it states."""
    solver = plan.solver
    if solver is None or solver.metric is None:
        yield unknown("predicted loss", "the plan states none")
        return
    if solver.metric not in METRICS:
        yield unknown("predicted loss", f"the plan was made by {solver.metric}, which this kvprof does not know")
        return
    try:
        again = task.solver(solver.method, solver.metric, entries_of(plan, task.tensors))
    except KvprofError as error:
        yield unknown("predicted loss", first_line(error))
        return
    said_kl, selected = solver.predicted_kl_nats, solver.selection_nats or 0.0  # the latter is `_solved`'s to find
    own_kl = None if said_kl is None else said_kl - selected
    numbers = [("objective", solver.objective, again.objective), ("predicted KL", own_kl, again.predicted_kl_nats)]
    if solver.selection_nats is None:
        numbers.append(("its standard error", solver.predicted_kl_stderr_nats, again.predicted_kl_stderr_nats))
    for words, said, found in numbers:
        if said is not None and found is None:
            yield unknown(words, "a format of the plan was not scored")
        elif (said, found) != (None, None):
            yield compared(words, said, found, note)


def _solved(plan: BitPlan, scores: Scores) -> Iterator[Check]:
    """Yield whether the plan's request, solved again, gives the plan."""
    names = ("formats", "budget asked for", "window", "optimality")
    try:
        request = read_request(plan)
        solved = solve_again(plan, scores, request)
    except InvalidFile as error:
        for name in names:
            yield unknown(name, first_line(error))
        return
    except KvprofError as error:  # no command makes a plan of these scores so
        for name in names:
            yield Check(name=name, status="differs", said="a plan", found="none", note=first_line(error))
        return
    yield formats_compared("formats", plan, solved)
    yield compared("budget asked for", _asked(plan), _asked(solved))
    yield compared("window", _window(plan), _window(solved))
    yield compared("optimality", _optimality(plan.solver), _optimality(solved.solver))
    if plan.solver is not None and plan.solver.selection_nats is not None and solved.solver is not None:
        for words, field in (
            ("selection", "selection_nats"),
            ("its standard error", "predicted_kl_stderr_nats"),
        ):
            yield compared(words, getattr(plan.solver, field), getattr(solved.solver, field))


def _asked(plan: BitPlan) -> str:
    if plan.budget is None or plan.budget.requested is None:
        return "none"
    return f"{plan.budget.requested:.15g} {plan.budget.unit}"


def _window(plan: BitPlan) -> str:
    quantizer = plan.quantizer
    own = ", a query's own token as stored" if plan.window.own_token_stored else ""
    return (
        f"{plan.window.sink_tokens} sinks and {plan.window.recent_tokens} tokens{own}, scales {quantizer.scale_dtype} "
        f"and {quantizer.zero_dtype}, rotation seed {quantizer.rotation_seed}"
    )


def _optimality(solver: Solver | None) -> str | None:
    if solver is None:
        return None
    words = [solver.method, "by", str(solver.metric), *([f"for {solver.target}"] if solver.target else [])]
    return " ".join([*words, "proven" if solver.optimal else "not proven"])


def _form(entry: TensorPlan) -> str:
    recent = f" recent {entry.recent_fraction:.0%}" if entry.recent_fraction else ""
    return f"{entry.name} per {entry.axis}{recent}"


def _text(value: object) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)
