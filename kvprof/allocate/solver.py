"""The exact multiple-choice knapsack: one choice for each item, the least total loss that a capacity allows.

Reads costs (exact integers) and losses (floats), returns the index of each item's choice.
Does not know what an item is: no layers, no bits, no units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvprof.errors import InfeasibleBudget, KvprofError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TIE = 1e-12
"""Losses that differ by no more than this share of the least count as equal: rounding must not choose a plan."""
SLACK = 1e-11
"""What a bound must exceed the best known loss by, relatively, before a state is given up: TIE, and sums' rounding."""
MAX_STATES = 2**22
"""States kept over all stages (64 MiB) before the search ends; 126 layers of 20 formats need a fiftieth of it."""
MAX_LIST = 2**20
"""States of one stage, likewise."""
MAX_UNITS = 2**53
"""Capacity, in reduced units, up to which a float64 holds every cost exactly."""


class Choice(NamedTuple):
    """One way to serve an item."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Solution:
    """A choice for each item."""

    choices: tuple[int, ...]
    """For each item, the index of its choice in the list that was given."""
    cost: int
    loss: float
    lower_bound: float
    """No feasible selection loses less."""

    @property
    def optimal(self) -> bool:
        """Whether `loss` is proven to be the least."""
        return self.loss <= self.lower_bound * (1 + TIE)


def solve(items: Sequence[Sequence[tuple[int, float]]], capacity: int) -> Solution:
    """Choose one (cost, loss) of every item, so that the total loss is the least whose total cost fits the capacity.

    items: for each item its choices, in any order; costs are integers of any unit, losses finite and not negative.
    capacity: what all costs together may be, in the same unit.

    Ties: of all selections whose loss is within 1e-12, relatively, of the least, the cheapest; of these, the one that
    gives the first item, then the second and so on, its most costly choice. A common factor in the losses changes
    nothing, nor does one in the costs and the capacity.

    The work is bounded. Where more than MAX_STATES states are needed (large uneven costs, and losses in proportion to
    them: a subset-sum problem in disguise), the best selection found is returned, its ties unsettled; `lower_bound`
    is then that of the linear relaxation, and `optimal` tells whether it is a proof.

    Method: dynamic programming over Pareto lists (Nemhauser and Ullmann 1969), states cut by the bound of the linear
    relaxation (Sinha and Zoltners 1979; Pisinger 1995).
    Raises InfeasibleBudget when the cheapest choices together exceed the capacity, KvprofError when the costs have too
    many digits, ValueError for an item without choices or an impossible loss.
    """
    problem = _Problem(items, capacity)
    stages, incumbent = _pareto_lists(problem)
    if incumbent is None:
        least = float(stages[0].losses[-1])
        first = int(np.searchsorted(-stages[0].losses, -least * (1 + TIE)))
        picks = _walk(problem, stages, 0, int(stages[0].costs[first]), least * (1 + TIE))
    else:
        picks = _complete(problem, stages, incumbent)
    choices = tuple(problem.indices[item][pick] for item, pick in enumerate(picks))
    loss = math.fsum(items[item][choice][1] for item, choice in enumerate(choices))
    return Solution(
        choices=choices,
        cost=sum(items[item][choice][0] for item, choice in enumerate(choices)),
        loss=loss,
        lower_bound=loss if incumbent is None else min(loss, problem.scale * incumbent.bound),
    )


class _Problem:
    """The items made ready: cheapest choices at cost 0, costs without a common divisor, losses at most 1."""

    def __init__(self, items: Sequence[Sequence[tuple[int, float]]], capacity: int) -> None:
        if not all(items):
            raise ValueError("an item has no choices")
        if not all(math.isfinite(loss) and loss >= 0 for item in items for _, loss in item):
            raise ValueError("a loss is negative or not finite")
        cheapest = [min(cost for cost, _ in item) for item in items]
        spare = capacity - sum(cheapest)
        if spare < 0:
            raise InfeasibleBudget(f"the cheapest choices cost {sum(cheapest)}, more than the capacity of {capacity}.")
        frontiers = [
            _frontier([(cost - least, loss, index) for index, (cost, loss) in enumerate(item) if cost - least <= spare])
            for item, least in zip(items, cheapest, strict=True)
        ]
        unit = math.gcd(*(cost for frontier in frontiers for cost, _, _ in frontier)) or 1
        self.capacity = min(spare, sum(frontier[-1][0] for frontier in frontiers)) // unit
        if self.capacity >= MAX_UNITS:
            raise KvprofError(f"costs of {self.capacity} units without a common divisor are beyond exact arithmetic.")
        self.scale = max((loss for frontier in frontiers for _, loss, _ in frontier), default=0.0) or 1.0
        self.items = [[Choice(cost // unit, loss / self.scale) for cost, loss, _ in frontier] for frontier in frontiers]
        """For each item its Pareto choices: cost ascending from 0, loss strictly descending."""
        self.indices = [[index for _, _, index in frontier] for frontier in frontiers]
        """For each Pareto choice its place in the caller's list."""

        steps = [(item, *step) for item, choices in enumerate(self.items) for step in _hull_steps(choices)]
        steps.sort(key=lambda step: -step[3] / step[2])  # stable: an item's own steps keep their order
        self.step_item = np.array([step[0] for step in steps], dtype=np.int64)
        self.step_pick = np.array([step[1] for step in steps], dtype=np.int64)
        self.step_cost = np.array([step[2] for step in steps], dtype=np.int64)
        self.step_drop = np.array([step[3] for step in steps], dtype=np.float64)

    def relaxation(self, count: int) -> tuple[Ints, Floats]:
        """Return the corners (cost, loss) of the linear relaxation of the first `count` items, by descending cost.

        Each corner is also a true selection. The losses are summed from the least one up, so that every one of them
        is relatively accurate however small it is.
        """
        mine = self.step_item < count
        costs = np.concatenate(([0], np.cumsum(self.step_cost[mine])))[::-1]
        floor = math.fsum(choices[-1].loss for choices in self.items[:count])
        losses = np.cumsum(np.concatenate(([floor], self.step_drop[mine][::-1])))
        return costs, losses


class _Stage(NamedTuple):
    """The Pareto list of the items from one item to the last: cost ascending, loss strictly descending."""

    costs: Ints
    losses: Floats

    def least(self, cost: int) -> float:
        """Return the least loss that a cost allows; infinity where it allows nothing."""
        state = int(np.searchsorted(self.costs, cost, side="right")) - 1
        return float(self.losses[state]) if state >= 0 else math.inf


class _Incumbent(NamedTuple):
    """The best selection known: a state of the last stage reached, and a corner of the relaxation for the rest."""

    stage: int
    cost: int
    loss: float
    spent_before: int
    total: float
    bound: float
    """What the linear relaxation of the whole problem loses."""


def _pareto_lists(problem: _Problem) -> tuple[list[_Stage], _Incumbent | None]:
    """Return the stages by first item; with them an incumbent only if their size ended the search early."""
    count = len(problem.items)
    stages = [_Stage(np.zeros(0, np.int64), np.zeros(0))] * count
    stages.append(_Stage(np.zeros(1, np.int64), np.zeros(1)))
    best: _Incumbent | None = None
    states = 0
    for first in range(count, -1, -1):
        corner_costs, corner_losses = problem.relaxation(first)
        if first < count:
            limit = math.inf if best is None else best.total * (1 + SLACK)
            stages[first] = _merge(problem, first, stages[first + 1], corner_costs, corner_losses, limit)
        costs, losses = stages[first]
        # Any state and the dearest corner that still fits make a feasible selection.
        corner = np.searchsorted(-corner_costs, costs - problem.capacity)
        totals = losses + corner_losses[corner]
        least = float(totals.min())
        if best is None or least < best.total * (1 - TIE):
            state = int(np.argmax(totals <= least * (1 + TIE)))
            best = _Incumbent(
                stage=first,
                cost=int(costs[state]),
                loss=float(losses[state]),
                spent_before=int(corner_costs[corner[state]]),
                total=least,
                bound=best.bound if best else float(np.interp(-problem.capacity, -corner_costs, corner_losses)),
            )
        states += len(costs)
        if first > 0 and (states > MAX_STATES or len(costs) > MAX_LIST):
            return stages, best
    return stages, None


def _merge(
    problem: _Problem, item: int, after: _Stage, corner_costs: Ints, corner_losses: Floats, limit: float
) -> _Stage:
    """Return the Pareto list with one more item in front, less the states that cannot lead to a loss of `limit`."""
    costs_of: list[Ints] = []
    losses_of: list[Floats] = []
    for cost, loss in problem.items[item]:
        fits = int(np.searchsorted(after.costs, problem.capacity - cost, side="right"))
        costs, losses = after.costs[:fits] + cost, after.losses[:fits] + loss
        # By descending cost, np.interp starts from the corner of less loss: no digits cancel.
        bounds = losses + np.interp(costs - problem.capacity, -corner_costs, corner_losses)
        hopeful = bounds <= limit
        costs_of.append(costs[hopeful])
        losses_of.append(losses[hopeful])
    costs, losses = np.concatenate(costs_of), np.concatenate(losses_of)
    order = np.argsort(costs, kind="stable")  # merges runs that are sorted already
    costs, losses = costs[order], losses[order]
    better = np.ones(len(costs), dtype=bool)
    better[1:] = losses[1:] < np.minimum.accumulate(losses)[:-1]
    costs, losses = costs[better], losses[better]
    last_of_cost = np.append(costs[1:] != costs[:-1], True)
    return _Stage(costs[last_of_cost], losses[last_of_cost])


def _walk(problem: _Problem, stages: list[_Stage], first: int, cost: int, loss: float) -> list[int]:
    """Return the picks of items `first` and later that cost and lose no more than given, the dearest pick first."""
    loss *= 1 + 4 * len(problem.items) * np.finfo(float).eps  # the stages summed in another order
    picks = []
    for item in range(first, len(problem.items)):
        choices = problem.items[item]
        pick = next(
            pick
            for pick in reversed(range(len(choices)))
            if choices[pick].loss + stages[item + 1].least(cost - choices[pick].cost) <= loss
        )
        cost, loss = cost - choices[pick].cost, loss - choices[pick].loss
        picks.append(pick)
    return picks


def _complete(problem: _Problem, stages: list[_Stage], incumbent: _Incumbent) -> list[int]:
    """Return the picks of an incumbent: a corner of the relaxation before its stage, a Pareto state from there on."""
    picks = [0] * incumbent.stage
    spent = 0
    for item, pick, cost in zip(problem.step_item, problem.step_pick, problem.step_cost, strict=True):
        if item < incumbent.stage and spent < incumbent.spent_before:
            picks[item] = int(pick)
            spent += cost
    return picks + _walk(problem, stages, incumbent.stage, incumbent.cost, incumbent.loss)


def _frontier(choices: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Return the choices that no other one beats in cost and loss, by ascending cost."""
    frontier: list[tuple[int, float, int]] = []
    for choice in sorted(choices):
        if not frontier or choice[1] < frontier[-1][1]:
            frontier.append(choice)
    return frontier


def _hull_steps(choices: list[Choice]) -> list[tuple[int, int, float]]:
    """Return (pick reached, added cost, loss saved) of each edge of the lower convex hull of one item's choices."""
    hull = [0]
    for pick in range(1, len(choices)):
        while len(hull) > 1 and _slope(choices, hull[-2], hull[-1]) <= _slope(choices, hull[-1], pick):
            hull.pop()
        hull.append(pick)
    return [
        (after, choices[after].cost - choices[before].cost, choices[before].loss - choices[after].loss)
        for before, after in pairwise(hull)
    ]


def _slope(choices: list[Choice], before: int, after: int) -> float:
    """Loss saved a unit of cost."""
    return (choices[before].loss - choices[after].loss) / (choices[after].cost - choices[before].cost)
