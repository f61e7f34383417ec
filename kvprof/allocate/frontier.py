"""Every budget at once: the best plan of each, what it stores and what it is predicted to lose, and where that bends.

Reads Scores and what a plan may choose from; writes a Frontier. Does not know how the knapsack is solved, nor files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from kvprof import __version__
from kvprof.allocate.budget import Limit, bit_limit
from kvprof.allocate.candidates import allowed_by
from kvprof.allocate.costs import written
from kvprof.allocate.coverage import covered_scores
from kvprof.allocate.methods import default_metric
from kvprof.allocate.problem import ExactProblem
from kvprof.allocate.solver import Solution
from kvprof.allocate.solver import frontier as solve_all
from kvprof.allocate.task import usual_window
from kvprof.errors import UsageError
from kvprof.records.frontier import Frontier, FrontierPoint
from kvprof.records.plan import BitPlan
from kvprof.records.requests.plan import FrontierRequest
from kvprof.records.scores import LOSS_INCREASE, Scores

USUAL_POINTS = 200
STEPS = tuple(Fraction(mantissa, 100) * 10**power for power in range(4) for mantissa in (1, 2, 5))
"""Between budgets that a person would write: 0.01, 0.02, 0.05, 0.1 and so on."""
KNEES = 3
"""How many knees are found at most."""
BEND = math.log(1.1)
"""How far, in the logarithm of the KL divergence, a knee lies below the chord at the least."""


def frontier(scores: Scores, request: FrontierRequest, command: str | None = None) -> Frontier:
    """Return the frontier of the plans that `methods.exact` makes by `loss_increase` at budgets from low to high.

    The ends are by default what the cheapest and the dearest plan cost; the budgets round ones, at most about
    USUAL_POINTS. command: for readers.
    Raises InfeasibleBudget for an end that no plan meets, UsageError for options that contradict each other or scores
    without `loss_increase`, which is all that tells nats.
    """
    context, batch = request.context, request.batch
    if LOSS_INCREASE not in scores.metrics and default_metric(scores) != LOSS_INCREASE:
        raise UsageError(
            f"a frontier needs scores with {LOSS_INCREASE}: a norm predicts no KL divergence.\n"
            "  Measure it with `kvprof gradients`, or name its file with --scores."
        )
    if context is None and batch is not None:
        raise UsageError("--batch needs to know how many tokens to hold.\n  Add --context 32768.")
    if context is not None and scores.geometry is None:
        raise UsageError("these scores carry no geometry, so the bytes of a plan are unknown.\n  Leave out --context.")
    window = usual_window(scores, request.sink_tokens, request.recent_tokens)
    scores = covered_scores(scores, request.layers, window, context)
    measure = bit_limit(0, request.unit)
    problem = ExactProblem(scores, measure, LOSS_INCREASE, allowed_by(request), request.tie, window)
    limits = [Limit(amount, measure.unit) for amount in _budgets(problem, request)]
    capacities = [problem.capacity(limit) for limit in limits]
    solutions = [
        problem.improved(solution, capacity)
        for solution, capacity in zip(solve_all(problem.items, capacities), capacities, strict=True)
    ]
    plans: dict[tuple[int, ...], BitPlan] = {}
    found = []
    for limit, solution in zip(limits, solutions, strict=True):
        if solution.choices not in plans:
            plans[solution.choices] = problem.plan(solution, None)
        found.append(_point(limit, solution, plans[solution.choices], context, batch or 1))
    # By what the plans are chosen by: what each is predicted to lose has the noise of its own sum of effects.
    curve = [(_spent(point, measure), solution.loss) for point, solution in zip(found, solutions, strict=True)]
    places = set(knees(curve))
    return Frontier(
        kvprof_version=__version__,
        model=scores.model,
        scores=problem.task.digest,
        command=command,
        metric=LOSS_INCREASE,
        unit="nominal" if measure.unit == "nominal" else "stored",
        window=problem.task.window,
        context=context,
        batch=None if context is None else batch or 1,
        kl_calibration=scores.kl_calibration,
        points=tuple(
            point.model_copy(update={"knee": True}) if place in places else point for place, point in enumerate(found)
        ),
    )


def knees(curve: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places at which a curve of (bits, KL divergence) bends, at most KNEES of them, ascending.

    A knee is the point that lies the farthest below the straight line between the ends, the KL divergence on a
    logarithmic scale: before it a bit divides the KL by more than on the average, after it by less. The same is asked
    again of the parts on both sides of a knee, the greatest bend first. What lies less than BEND below its line is
    none. Of points of equal bits the first counts; points without any loss have no place on such a scale.
    """
    places: list[int] = []
    for place, (bits, kl) in enumerate(curve):
        if kl > 0 and (not places or bits > curve[places[-1]][0]):
            places.append(place)
    logs = {place: (curve[place][0], math.log(curve[place][1])) for place in places}

    def farthest(first: int, last: int) -> tuple[float, int]:
        """Return how far the farthest point between two lies below their line, and which one it is."""
        (left, top), (right, bottom) = logs[places[first]], logs[places[last]]
        slope = (bottom - top) / (right - left)
        return max(
            ((top + slope * (logs[places[at]][0] - left) - logs[places[at]][1], -at) for at in range(first + 1, last)),
            default=(0.0, 0),
        )

    found: list[int] = []
    ends = [0, len(places) - 1]
    while len(found) < KNEES and len(places) > 2:
        parts = [farthest(first, last) for first, last in pairwise(ends) if last - first > 1]
        depth, at = max(parts, default=(0.0, 0))
        if depth < BEND:
            break
        found.append(places[-at])
        ends = sorted([*ends, -at])
    return sorted(found)


def _budgets(problem: ExactProblem, request: FrontierRequest) -> list[Fraction]:
    """Return the budgets, ascending, each once."""
    unit = problem.limit.unit
    reach = [problem.prices.amount(cost) for cost in (problem.cheapest, problem.dearest)]
    ends = []
    for option, given, end, rounded in (
        ("--from", request.low, reach[0], math.ceil),
        ("--to", request.high, reach[1], math.floor),
    ):
        limit = bit_limit(written(end, unit, rounded) if given is None else given, unit)
        if given is None and not reach[0] <= limit.amount <= reach[1]:
            limit = Limit(end, unit)  # where all plans cost nearly the same, no short number lies among them
        problem.check_reach(limit, option)
        ends.append(limit.amount)
    first, last = ends
    if first > last:
        raise UsageError(f"--from {float(first):g} is more than --to {float(last):g}.")
    points = request.points
    if points is None:
        step = next(step for step in STEPS if (last - first) / step <= USUAL_POINTS)
        between = [step * count for count in range(math.ceil(first / step), math.floor(last / step) + 1)]
        return sorted({first, *between, last})
    fine = 10**4 if (last - first) / points > Fraction(1, 1000) else 10**8  # so that they can be typed
    even = [first + (last - first) * Fraction(count, points - 1) for count in range(1, points - 1)]
    return sorted({first, *(max(Fraction(math.floor(amount * fine), fine), first) for amount in even), last})


def _point(limit: Limit, solution: Solution, plan: BitPlan, context: int | None, batch: int) -> FrontierPoint:
    budget, solver = plan.budget, plan.solver
    assert budget is not None
    assert solver is not None
    assert budget.nominal_bits is not None
    assert budget.stored_bits is not None
    assert solver.predicted_kl_nats is not None
    return FrontierPoint(
        budget=float(limit.amount),
        nominal_bits=budget.nominal_bits,
        stored_bits=budget.stored_bits,
        bytes_per_token=budget.bytes_per_token,
        bytes=None if context is None else plan.bytes_at(context, batch),
        compression=16 / budget.stored_bits,
        predicted_kl_nats=solver.predicted_kl_nats,
        predicted_kl_stderr_nats=solver.predicted_kl_stderr_nats,
        plan_digest=plan.recipe,
        optimal=solution.optimal,
        knee=False,
    )


def _spent(point: FrontierPoint, measure: Limit) -> float:
    return point.nominal_bits if measure.unit == "nominal" else point.stored_bits
