"""A plan solved within what a runtime can be told, and the plan that it would be without that restriction.

Reads Scores, a target and a limit; writes BitPlans. Does not know how a grammar is searched (grammars.py).
"""

from __future__ import annotations

from typing_extensions import Unpack

from kvprof.allocate.budget import Limit, stored_bits_per_element
from kvprof.allocate.candidates import Allowed
from kvprof.allocate.grammars import FULL, Assignment, Cell, Table, reach
from kvprof.allocate.measured import Measured, entries_of, planned_tensors
from kvprof.allocate.pricing import check_reach
from kvprof.allocate.problem import ExactProblem
from kvprof.allocate.rules import exact
from kvprof.allocate.scored import every_format
from kvprof.allocate.targets import Target
from kvprof.errors import InfeasibleBudget, InvalidFile, UsageError
from kvprof.records.formats import TENSORS, parse_formats
from kvprof.records.plan import BitPlan, Window
from kvprof.records.scores import LOSS_INCREASE, Scores


def plan_within(
    scores: Scores,
    target: Target,
    limit: Limit,
    *,
    window: Window | None = None,
    command: str | None = None,
    **allowed: Unpack[Allowed],
) -> BitPlan:
    """Return the plan that loses the least of all that a runtime can be told, within a limit.

    A plan costs what the runtime stores. limit: as for `rules.exact`. window: by default the runtime's own. allowed:
    narrows the choice further, as for `rules.exact`.
    Raises InfeasibleBudget, naming what the runtime can reach; UsageError for scores that know none of its formats.
    """
    if LOSS_INCREASE not in scores.metrics:
        raise InvalidFile(
            f"--target {target.name} needs scores with {LOSS_INCREASE} of its formats.\n"
            f"  Measure them with `kvprof gradients --target {target.name}`."
        )
    window = window or target.window
    if target.grammar is None:
        return _for(exact(scores, limit, metric=LOSS_INCREASE, window=window, command=command, **allowed), target)
    named = {**allowed, "formats": _formats(scores, target, allowed.get("formats"))}
    problem = ExactProblem(scores, limit, LOSS_INCREASE, named, None, window, command)  # type: ignore[arg-type]
    table = _table(problem, target)
    ends = reach(target.grammar, table)
    if ends is None:
        raise UsageError(
            f"{target.name} takes {target.words}: none of what the scores and the options leave is such a plan.\n"
            "  Loosen --pin, --bits or --formats, or score all layers in the same formats."
        )
    low, high = (problem.prices.amount(end) for end in ends)
    narrowed = [option for option in problem.narrowed if option != "--formats" or allowed.get("formats")]
    check_reach(limit, low, high, [], True, narrowed, target=f"{target.name}, which takes {target.words},")
    found = target.grammar.best(table, problem.prices.capacity(limit.amount))
    if found is None:
        raise InfeasibleBudget(f"no plan that {target.name} can be told fits {limit.amount} {limit.unit}.")
    parts = _parts(problem, found.assignment)
    solver = problem.task.predicted("exact", parts, found.proven)
    return _for(problem.task.plan([part.format for part in parts], solver, limit), target)


def unrestricted(scores: Scores, plan: BitPlan) -> BitPlan:
    """Return the plan of least loss that stores no more bits than a plan does: any scored format for any tensor.

    What it is predicted to lose less is the price of the restriction. Raises as `rules.exact` does.
    """
    tensors = planned_tensors(plan, scores.geometry)
    same = Limit(stored_bits_per_element(tensors, entries_of(plan, tensors)), "stored")
    return exact(scores, same, metric=LOSS_INCREASE, window=plan.window, formats=every_format(scores))


def _for(plan: BitPlan, target: Target) -> BitPlan:
    assert plan.solver is not None
    return plan.model_copy(update={"solver": plan.solver.model_copy(update={"target": target.name})})


def _formats(scores: Scores, target: Target, asked: str | None) -> str:
    """Return the names that a plan may choose from, as `Allowed` takes them: the target's, of these what is asked for.

    Full precision loses nothing, and needs no score.
    """
    wanted = None if asked is None else parse_formats(asked)
    words = []
    for tensor in TENSORS:
        scored = {name for entry in scores.planned for name in entry.tensor(tensor).loss_increase or {}}
        known = target.formats_of(tensor)
        own = [name for name in known if name in scored or name == FULL]
        if not any(name in scored for name in own):
            raise UsageError(
                f"these scores know none of {target.name}'s formats for {tensor}s: {', '.join(known)}.\n"
                f"  Measure them with `kvprof gradients --target {target.name}`."
            )
        if wanted is not None and wanted[tensor]:
            if unknown := [name for name in wanted[tensor] if name not in known]:
                raise UsageError(
                    f"--formats: {target.name} knows no {unknown[0]} for {tensor}s.\n  It has {', '.join(known)}."
                )
            own = [name for name in own if name in wanted[tensor]]
        words += [f"{tensor}:{name}" for name in own]
    return ",".join(words)


def _table(problem: ExactProblem, target: Target) -> Table:
    rows = zip(problem.task.tensors, problem.candidates, problem.prices.costs, strict=True)
    cells = {
        (tensor.layer, tensor.name): {
            choice.format.name: Cell(cost, choice.loss) for choice, cost in zip(choices, costs, strict=True)
        }
        for tensor, choices, costs in rows
    }
    return Table(cells, _num_layers(problem))


def _num_layers(problem: ExactProblem) -> int:
    scores = problem.task.scores
    if scores.geometry is not None:
        return scores.geometry.num_layers
    return scores.model.num_layers if scores.model is not None else len(scores.layers)


def _parts(problem: ExactProblem, assignment: Assignment) -> list[Measured]:
    found = []
    for tensor, choices in zip(problem.task.tensors, problem.candidates, strict=True):
        name = assignment[tensor.layer, tensor.name]
        found.append(next(choice for choice in choices if choice.format.name == name))
    return found
