"""The cheapest plan that is predicted to lose no more than so much: the inverse of spending a budget.

Reads Scores and a KL divergence; writes a BitPlan. Does not know how the knapsack is solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_CEILING, Decimal, InvalidOperation

from typing_extensions import Unpack

from kvprof.allocate.budget import Limit
from kvprof.allocate.candidates import Allowed
from kvprof.allocate.costs import written
from kvprof.allocate.methods import default_metric
from kvprof.allocate.problem import ExactProblem
from kvprof.allocate.solver import Knapsack, Solution
from kvprof.errors import InfeasibleBudget, UsageError
from kvprof.records.plan import BitPlan, Window
from kvprof.records.scores import LOSS_INCREASE, Scores


def cheapest(
    scores: Scores,
    max_kl: str | float,
    measure: Limit,
    *,
    tie: str | None = None,
    window: Window | None = None,
    **allowed: Unpack[Allowed],
) -> BitPlan:
    """Return the plan that costs the least of all whose predicted KL divergence stays at or below a limit.

    max_kl: nats a token, compared with `predicted_kl_nats`, the calibration's factor in it. measure: its unit, context
    and batch say what a cost is; its amount does not matter. The rest is as for `methods.exact`. Of plans that cost the
    same, the one of least loss.
    Raises InfeasibleBudget, naming what can be reached, where no plan stays below; UsageError for a number that is no
    KL divergence, or scores without `loss_increase`.
    """
    most = parse_kl(max_kl)
    if LOSS_INCREASE not in scores.metrics and default_metric(scores) != LOSS_INCREASE:
        raise UsageError(
            f"--max-kl needs scores with {LOSS_INCREASE}: a norm predicts no KL divergence.\n"
            "  Measure it with `kvprof gradients`, or give a --budget."
        )
    problem = ExactProblem(scores, measure, LOSS_INCREASE, allowed, tie, window)
    knapsack = Knapsack(problem.items, problem.dearest)

    def within(nats: float) -> tuple[Solution, bool] | None:
        return _least(problem, knapsack, lambda solution: problem.predicted(solution) <= nats)

    aim, found = most, within(most)
    while found is not None and (nats := _whole(problem, found[0])) > most:
        aim *= min(0.99, most / nats)  # what the choice made of noise is known of a plan once it is chosen
        found = within(aim)
    if found is None and aim < most:  # what one plan's choice made of noise may be too much to ask of all others
        found = _least(problem, knapsack, lambda solution: _whole(problem, solution) <= most)
    if found is None:
        best, least = (problem.best(capacity) for capacity in (problem.dearest, problem.cheapest))
        reached = [_whole(problem, best), _whole(problem, least)]
        costs = [written(problem.prices.amount(solution.cost), measure.unit, round) for solution in (best, least)]
        of = "of cache" if measure.unit == "bytes" else f"{measure.unit} bits"
        better = f"loosen {' or '.join(problem.narrowed)}" if problem.narrowed else "allow better formats"
        raise InfeasibleBudget(
            f"{max_kl} nats a token is below what these formats are predicted to reach.\n"
            f"  least: {rounded_up(reached[0])} nats at {costs[0]} {of}    "
            f"cheapest plan: {reached[1]:.3g} nats at {costs[1]} {of}\n"
            f"  try --max-kl {rounded_up(reached[0])}, or {better}"
        )
    solution, proven = found
    return problem.plan(solution, None, proven and problem.adds_up)


def _least(
    problem: ExactProblem, knapsack: Knapsack, serves: Callable[[Solution], bool]
) -> tuple[Solution, bool] | None:
    """Return the cheapest solution found that serves, and whether none that is cheaper does; None where none serves.

    serves: as `Knapsack.least_capacity` has it. Where losses do not add up, choices that no sum of losses would take
    count too, so that capacities reach up to the dearest of all.
    """
    if problem.adds_up:
        return knapsack.least_capacity(serves)

    def at(capacity: int) -> Solution:
        return problem.improved(knapsack.solve(capacity), capacity)

    first = problem.cheapest
    unit = math.gcd(*(cost - min(item)[0] for item in problem.items for cost, _ in item)) or 1
    best, fails = at(problem.dearest), -1
    if not serves(best):
        return None
    while (works := (best.cost - first) // unit) - fails > 1:
        middle = (fails + works) // 2
        found = at(first + unit * middle)
        if serves(found):
            best = found
        else:
            fails = middle
    return best, False


def _whole(problem: ExactProblem, solution: Solution) -> float:
    """Return all that a solution is predicted to lose."""
    nats = problem.solver(solution, optimal=False).predicted_kl_nats
    assert nats is not None
    return nats


def parse_kl(text: str | float) -> float:
    """Read a KL divergence in nats a token; raises UsageError for what is no finite number from 0 on."""
    try:
        amount = Decimal(str(text))
    except InvalidOperation:
        amount = Decimal("nan")
    if not amount.is_finite() or amount < 0:
        raise UsageError(f"--max-kl {text} is no KL divergence in nats a token.\n  Try --max-kl 0.01.")
    return float(amount)


def rounded_up(nats: float) -> str:
    """Return a number of three digits that is not below another, as an option takes it."""
    if nats == 0:
        return "0"
    exact = Decimal(repr(nats))
    digits = exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), rounding=ROUND_CEILING)
    return f"{float(digits):.3g}"
