"""The exact multiple-choice knapsack: one choice for each item, the least total loss that a capacity allows.

Reads costs (exact integers) and losses (floats), returns the index of each item's choice.
Does not know what an item is: no layers, no bits, no units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvprof.allocate.pareto import SLACK, TIE, Choice, Floats, Ints, Items, Selection, search
from kvprof.errors import InfeasibleBudget, KvprofError

Bools = NDArray[np.bool_]

MAX_STATES = 2**22
"""States kept over all stages (64 MiB) before the search ends; 126 layers of 20 formats need a thousandth of it."""
MAX_LIST = 2**20
"""States of one stage, likewise."""
MAX_UNITS = 2**53
"""Capacity, in reduced units, up to which a float64 holds every cost exactly."""
CORE = 24
"""Choices, besides those of the linear relaxation, that are searched first."""
CORE_STATES = 2**16
"""States that the first search may keep: it need not be exact, only good."""


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

    Method: see Knapsack.
    Raises InfeasibleBudget when the cheapest choices together exceed the capacity, KvprofError when the costs have too
    many digits, ValueError for an item without choices or an impossible loss.
    """
    return Knapsack(items, capacity).solve(capacity)


def frontier(items: Sequence[Sequence[tuple[int, float]]], capacities: Iterable[int]) -> list[Solution]:
    """Return what `solve` returns for each capacity, to the bit, the items made ready once."""
    wanted = list(capacities)
    if not wanted:
        return []
    whole = Knapsack(items, max(wanted))
    # Where a choice alone exceeds the capacity, `solve` would not have known of it.
    return [whole.solve(capacity) if whole.fits_each(capacity) else solve(items, capacity) for capacity in wanted]


class Knapsack:
    """Items made ready to be solved at any capacity up to a largest one.

    The steps of the linear relaxation are sorted once. At each capacity its corner is a good selection, and its slope
    says of every other choice how much a selection that has it must lose at the least. A first search among the few
    most hopeful choices finds a better selection; whatever cannot lose as little is then given up, and what is left,
    a dozen items, is searched exactly (Pisinger 1995 calls it the core; see pareto.py for the search).
    """

    def __init__(self, items: Sequence[Sequence[tuple[int, float]]], largest: int) -> None:
        """largest: no capacity beyond it is asked for, so choices that cannot fit it are left out."""
        if not all(items):
            raise ValueError("an item has no choices")
        if not all(math.isfinite(loss) and loss >= 0 for item in items for _, loss in item):
            raise ValueError("a loss is negative or not finite")
        self.items = items
        cheapest = [min(cost for cost, _ in item) for item in items]
        self._least = sum(cheapest)
        self._dearest_step = max(
            (max(cost for cost, _ in item) - least for item, least in zip(items, cheapest, strict=True)), default=0
        )
        spare = largest - self._least
        frontiers = (
            [
                _frontier(
                    [(cost - least, loss, index) for index, (cost, loss) in enumerate(item) if cost - least <= spare]
                )
                for item, least in zip(items, cheapest, strict=True)
            ]
            if spare >= 0
            else []
        )
        self._unit = math.gcd(*(cost for frontier in frontiers for cost, _, _ in frontier)) or 1
        self._room = min(max(spare, 0), sum(frontier[-1][0] for frontier in frontiers)) // self._unit
        if self._room >= MAX_UNITS:
            raise KvprofError(f"costs of {self._room} units without a common divisor are beyond exact arithmetic.")
        self._scale = max((loss for frontier in frontiers for _, loss, _ in frontier), default=0.0) or 1.0
        self._choices = [
            [Choice(cost // self._unit, loss / self._scale) for cost, loss, _ in frontier] for frontier in frontiers
        ]
        """For each item its Pareto choices: cost ascending from 0, loss strictly descending."""
        self._indices = [[index for _, _, index in frontier] for frontier in frontiers]
        """For each Pareto choice its place in the caller's list."""

        shape = (len(frontiers), max(map(len, frontiers), default=1))
        self._costs: NDArray[np.int64] = np.full(shape, MAX_UNITS, dtype=np.int64)
        self._losses = np.full(shape, np.inf)
        for item, choices in enumerate(self._choices):
            self._costs[item, : len(choices)], self._losses[item, : len(choices)] = zip(*choices, strict=True)
        whole = Items(self._choices, self._room)
        self._steps = whole
        costs, losses = whole.relaxation(len(frontiers))
        self._corner_costs, self._corner_losses = -costs[::-1], losses[::-1]

    def fits_each(self, capacity: int) -> bool:
        """Whether every choice of an item fits a capacity, the cheapest of all others beside it."""
        return self._least + self._dearest_step <= capacity

    def solve(self, capacity: int) -> Solution:
        """Return the best selection at a capacity, as `solve` does."""
        spare = capacity - self._least
        if spare < 0:
            raise InfeasibleBudget(f"the cheapest choices cost {self._least}, more than the capacity of {capacity}.")
        room = min(spare // self._unit, self._room)
        taken = int(np.searchsorted(self._corner_costs, room, side="right")) - 1  # steps of the relaxation that fit
        corner = np.zeros(len(self._choices), dtype=np.int64)
        np.maximum.at(corner, self._steps.step_item[:taken], self._steps.step_pick[:taken])
        loss, bound, excess = self._relaxed(taken, corner, room)

        left = excess <= (loss - bound) + SLACK * loss
        tried = np.zeros(left.shape, dtype=bool)
        places = np.flatnonzero(left)
        tried.flat[places[np.argsort(excess.flat[places], kind="stable")[:CORE]]] = True
        best = self._search(corner, tried, room, loss, CORE_STATES)
        loss = min(loss, best.loss)
        left &= excess <= (loss - bound) + SLACK * loss
        if not best.settled or (left & ~tried).any():
            found = self._search(corner, left, room, loss, MAX_STATES)
            best = found if found.settled or found.loss < best.loss else best._replace(settled=False)
        return self._solution(best, bound)

    def least_capacity(self, serves: Callable[[Solution], bool]) -> tuple[Solution, bool] | None:
        """Return the cheapest solution that serves, and whether none that is cheaper does, for certain.

        serves: true of the best solution at some capacity, and then of that at any larger one. None where it is true
        of none.
        """
        best = self.solve(self._least + self._unit * self._room)
        if not serves(best):
            return None
        fails, proven = -1, True
        while (works := (best.cost - self._least) // self._unit) - fails > 1:
            middle = (fails + works) // 2
            found = self.solve(self._least + self._unit * middle)
            if serves(found):
                best = found
            else:
                fails, proven = middle, found.optimal
        return best, proven and best.optimal

    def _relaxed(self, taken: int, corner: Ints, room: int) -> tuple[float, float, Floats]:
        """Return the corner's loss, the bound of the linear relaxation, and by how much each choice must exceed it."""
        steps = self._steps
        loss = float(self._corner_losses[taken])
        bound, price = loss, 0.0
        if taken < len(steps.step_cost):
            left = (self._corner_costs[taken + 1] - room) / steps.step_cost[taken]
            bound = float(self._corner_losses[taken + 1] + steps.step_drop[taken] * left)
            price = float(steps.step_drop[taken] / steps.step_cost[taken])
        rows = np.arange(len(corner))
        extra = self._costs - self._costs[rows, corner][:, None]
        excess = self._losses - self._losses[rows, corner][:, None] + price * extra
        excess[self._costs > room] = np.inf
        excess[rows, corner] = np.inf  # the corner's own choices are always searched
        return loss, bound, excess

    def _search(self, corner: Ints, others: Bools, room: int, limit: float, max_states: int) -> Selection:
        """Return the best selection of the corner's choices and the others marked, as a pick of every item."""
        picks = corner.tolist()
        open_items = np.flatnonzero(others.any(axis=1)).tolist()
        given = [sorted({picks[item], *np.flatnonzero(others[item]).tolist()}) for item in open_items]
        rows = [[self._choices[item][pick] for pick in row] for item, row in zip(open_items, given, strict=True)]
        fixed = [choices[pick] for choices, pick in zip(self._choices, picks, strict=True)]
        spent = sum(choice.cost for choice in fixed)
        for item, row in zip(open_items, rows, strict=True):
            spent += row[0].cost - fixed[item].cost
            fixed[item] = Choice(0, 0.0)
        items = Items(
            [[Choice(choice.cost - row[0].cost, choice.loss) for choice in row] for row in rows],
            room - spent,
            math.fsum(choice.loss for choice in fixed),
        )
        found = search(items, limit, max_states, min(max_states, MAX_LIST))
        for item, row, pick in zip(open_items, given, found.picks, strict=True):
            picks[item] = row[pick]
        return found._replace(picks=picks)

    def _solution(self, best: Selection, bound: float) -> Solution:
        choices = tuple(row[pick] for row, pick in zip(self._indices, best.picks, strict=True))
        loss = math.fsum(item[choice][1] for item, choice in zip(self.items, choices, strict=True))
        return Solution(
            choices=choices,
            cost=sum(item[choice][0] for item, choice in zip(self.items, choices, strict=True)),
            loss=loss,
            lower_bound=loss if best.settled else min(loss, self._scale * bound),
        )


def _frontier(choices: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Return the choices that no other one beats in cost and loss, by ascending cost."""
    frontier: list[tuple[int, float, int]] = []
    for choice in sorted(choices):
        if not frontier or choice[1] < frontier[-1][1]:
            frontier.append(choice)
    return frontier
