"""A plan solved within what a runtime can be told, and the plan that it would be without that restriction.

Reads Scores, a target and a limit; writes BitPlans. Does not know how constraints are searched (constraints.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import Unpack

from kvprof.allocate.budget import CachedTensor, Limit, stored_bits_per_element
from kvprof.allocate.candidates import Allowed
from kvprof.allocate.constraints import FULL, Assignment, Cell, Table, reach
from kvprof.allocate.costs import check_reach
from kvprof.allocate.losses import PredictedLoss, entries_of, planned_tensors, predicted_losses, storage
from kvprof.allocate.methods import exact
from kvprof.allocate.problem import ExactProblem
from kvprof.allocate.scored import every_format
from kvprof.allocate.target import Target
from kvprof.allocate.task import PlanTask
from kvprof.errors import InfeasibleBudget, InvalidFile, UsageError
from kvprof.records.external_formats import EXTERNAL
from kvprof.records.formats import TENSORS, parse_formats
from kvprof.records.plan import BitPlan, Window
from kvprof.records.scores import LOSS_INCREASE, Scores


def plan_within(
    scores: Scores,
    target: Target,
    limit: Limit,
    *,
    window: Window | None = None,
    **allowed: Unpack[Allowed],
) -> BitPlan:
    """Return the plan that loses the least of all that a runtime can be told, within a limit.

    A plan costs what the runtime stores. limit: as for `methods.exact`. window: by default the runtime's own. allowed:
    narrows the choice further, as for `methods.exact`.
    Raises InfeasibleBudget, naming what the runtime can reach; UsageError for scores that know none of its formats.
    """
    if LOSS_INCREASE not in scores.metrics:
        raise InvalidFile(
            f"--target {target.name} needs scores with {LOSS_INCREASE} of its formats.\n"
            f"  Measure them with `kvprof gradients --target {target.name}`."
        )
    window = window or target.window
    target = _as_scored(target, scores)
    if target.constraints is None:
        return _for(exact(scores, limit, metric=LOSS_INCREASE, window=window, **allowed), target)
    named: Allowed = {
        **allowed,
        "formats": _formats(scores, target, allowed.get("formats"), allowed.get("group_size")),
        "group_size": None,
    }
    problem = ExactProblem(scores, limit, LOSS_INCREASE, named, None, window)
    rows = _Rows(problem, target)
    table = rows.table()
    ends = reach(target.constraints, table)
    if ends is None:
        raise UsageError(
            f"{target.name} takes {target.words}: none of what the scores and the options leave is such a plan.\n"
            "  Loosen --pin, --bits or --formats, or score all layers in the same formats."
        )
    low, high = (problem.prices.amount(end) for end in ends)
    narrowed = [option for option in problem.narrowed if option != "--formats" or allowed.get("formats")]
    check_reach(limit, low, high, [], True, narrowed, target=f"{target.name}, which takes {target.words},")
    found = target.constraints.best(table, problem.prices.capacity(limit.amount))
    if found is None:
        raise InfeasibleBudget(f"no plan that {target.name} can be told fits {limit.amount} {limit.unit}.")
    parts = rows.parts(found.assignment)
    solver = problem.task.predicted("exact", parts, found.proven and problem.adds_up)
    return _for(problem.task.plan([part.format for part in parts], solver, limit), target)


def unrestricted(scores: Scores, plan: BitPlan, pins: Sequence[str] = (), min_key_bits: int | None = None) -> BitPlan:
    """Return the plan of least loss that stores no more bits than a plan does: any scored format for any tensor.

    What it is predicted to lose less is the price of the restriction. pins, min_key_bits: what the plan itself had to
    obey. Raises as `methods.exact` does.
    """
    tensors = planned_tensors(plan, scores.geometry)
    same = Limit(stored_bits_per_element(tensors, entries_of(plan, tensors)), "stored")
    return exact(
        scores.leaving(plan.reasons),
        same,
        metric=LOSS_INCREASE,
        window=plan.window,
        formats=every_format(scores),
        pins=pins,
        min_key_bits=min_key_bits,
    )


def _for(plan: BitPlan, target: Target) -> BitPlan:
    assert plan.solver is not None
    return plan.model_copy(update={"solver": plan.solver.model_copy(update={"target": target.name})})


def _as_scored(target: Target, scores: Scores) -> Target:
    """Return a target as it stores the model of some scores; as it is where they know none of those formats.

    Those of an earlier kvprof know the formats of its words without what the runtime does first, or in float16 alone.
    """
    own = target.for_model(scores.geometry, None if scores.model is None else scores.model.architecture)
    return own if any(_scored(tensor, own, scores) for tensor in PlanTask(scores).tensors) else target


def _formats(scores: Scores, target: Target, asked: str | None, group_size: int | None) -> str:
    """Return the names that a plan may choose from, as `Allowed` takes them: the target's, of these what is asked for.

    Full precision loses nothing, and needs no score.
    """
    wanted = None if asked is None else parse_formats(asked)
    tensors = PlanTask(scores).tensors
    words = []
    for name in TENSORS:
        known = target.formats_of(name)
        found = {one for tensor in tensors if tensor.name == name for one in _scored(tensor, target, scores)}
        scored = [one for one in known if one in found]
        if not scored:
            raise UsageError(
                f"these scores know none of {target.name}'s formats for {name}s: {', '.join(known)}.\n"
                f"  Measure them with `kvprof gradients --target {target.name}`."
            )
        own = [one for one in known if one in scored or one == FULL]
        for word in () if wanted is None else wanted[name]:
            if word not in known:
                raise UsageError(f"--formats: {target.name} knows no {word} for {name}s.\n  It has {', '.join(known)}.")
            if word not in own:
                raise UsageError(
                    f"--formats: {word} was not scored for {name}s.\n"
                    f"  Of {target.name}'s there are {', '.join(scored)}."
                )
        if wanted is not None and wanted[name]:
            own = [one for one in own if one in wanted[name]]
        if group_size is not None:
            own = [one for one in own if one not in EXTERNAL or EXTERNAL[one].block == group_size]
            if not any(one in scored for one in own):
                raise UsageError(f"--group-size {group_size}: none of {target.name}'s scored formats has such groups.")
        words += [f"{name}:{one}" for one in own]
    return ",".join(words)


class _Rows:
    """The problem's candidates by the names that the target's constraints know them by."""

    def __init__(self, problem: ExactProblem, target: Target) -> None:
        self._problem = problem
        self._places = [
            _by_name(tensor, choices, target)
            for tensor, choices in zip(problem.task.tensors, problem.candidates, strict=True)
        ]

    def table(self) -> Table:
        """Return what each tensor may have."""
        problem = self._problem
        rows = zip(problem.task.tensors, self._places, problem.candidates, problem.prices.costs, strict=True)
        cells = {
            (tensor.layer, tensor.name): {
                name: Cell(costs[place], choices[place].loss) for name, place in places.items()
            }
            for tensor, places, choices, costs in rows
        }
        return Table(cells, problem.task.model.num_layers)

    def parts(self, assignment: Assignment) -> list[PredictedLoss]:
        """Return what was measured of each tensor's format."""
        rows = zip(self._problem.task.tensors, self._places, self._problem.candidates, strict=True)
        return [choices[places[assignment[tensor.layer, tensor.name]]] for tensor, places, choices in rows]


def _scored(tensor: CachedTensor, target: Target, scores: Scores) -> dict[str, int]:
    return _by_name(tensor, predicted_losses(scores, tensor), target)


def _by_name(tensor: CachedTensor, choices: Sequence[PredictedLoss], target: Target) -> dict[str, int]:
    """Return, of what was measured of a tensor, the place of each format that a target has a name for."""
    places = {storage(choice.format, tensor.head_dim): place for place, choice in enumerate(choices)}
    named = {name: storage(form, tensor.head_dim) for name, form in target.forms(tensor).items()}
    return {name: places[stored] for name, stored in named.items() if stored in places}
