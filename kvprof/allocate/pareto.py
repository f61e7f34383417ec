"""Dynamic programming over Pareto lists: the least loss of a few items, ties settled, its work bounded.

Reads items made ready by the solver (integer costs from 0, losses of one scale); returns the pick of each.
Does not know capacities that vary, nor what an item is.

Method: Nemhauser and Ullmann 1969, states cut by the bound of the linear relaxation (Sinha and Zoltners 1979;
Pisinger 1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvprof.allocate.hull import corners

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TIE = 1e-12
"""Losses that differ by no more than this share of the least count as equal: rounding must not choose a plan."""
SLACK = 1e-11
"""What a bound must exceed the best known loss by, relatively, before a state is given up: TIE, and sums' rounding."""

LONG_LIST = 2**12
"""States from which on it pays to cut them before they are sorted."""


class Choice(NamedTuple):
    """One way to serve an item."""

    cost: int
    loss: float


class Selection(NamedTuple):
    """A pick of every item."""

    picks: list[int]
    loss: float
    settled: bool
    """Whether no selection is better; otherwise the search ended early, its ties unsettled."""


class Items:
    """What is searched: for each item its Pareto choices, cost ascending from 0, loss strictly descending."""

    def __init__(self, choices: Sequence[Sequence[Choice]], capacity: int, loss: float = 0.0) -> None:
        """loss: what is lost besides, whatever is picked; it counts where ties are judged."""
        self.choices = choices
        self.capacity = capacity
        self.loss = loss
        steps = [
            (item, after, row[after].cost - row[before].cost, row[before].loss - row[after].loss)
            for item, row in enumerate(choices)
            for before, after in pairwise(corners(row))
        ]
        steps.sort(key=lambda step: -step[3] / step[2])  # stable: an item's own steps keep their order
        self.step_item = np.array([step[0] for step in steps], dtype=np.int64)
        self.step_pick = np.array([step[1] for step in steps], dtype=np.int64)
        self.step_cost = np.array([step[2] for step in steps], dtype=np.int64)
        self.step_drop = np.array([step[3] for step in steps], dtype=np.float64)
        self._floors = [0.0, *accumulate(row[-1].loss for row in choices)]

    def relaxation(self, count: int) -> tuple[Ints, Floats]:
        """Return the corners (cost, negated; loss) of the linear relaxation of the first `count` items, dearest first.

        Each corner is also a true selection. The losses are summed from the least one up, so that every one of them
        is relatively accurate however small it is.
        """
        mine = self.step_item < count
        added, drops = self.step_cost[mine], self.step_drop[mine]
        costs = np.zeros(len(added) + 1, dtype=np.int64)
        np.cumsum(added, out=costs[1:])
        losses = np.empty(len(drops) + 1)
        losses[0] = self._floors[count]
        losses[1:] = drops[::-1]
        return -costs[::-1], np.cumsum(losses)


def search(items: Items, limit: float, max_states: int, max_list: int) -> Selection:
    """Return the selection of least loss whose cost fits the capacity.

    Of all selections whose loss is within TIE, relatively, of the least, the cheapest; of these, the one that gives the
    first item, then the second and so on, its most costly choice.
    limit: a loss that some selection does not exceed. max_states: kept over all stages before the search ends early.
    max_list: of one stage, likewise.
    """
    stages, incumbent = _pareto_lists(items, limit, max_states, max_list)
    if incumbent is not None:
        return Selection(_complete(items, stages, incumbent), incumbent.total, settled=False)
    least = float(stages[0].losses[-1])
    first = int(np.searchsorted(-stages[0].losses, -least * (1 + TIE)))
    picks = _walk(items, stages, 0, int(stages[0].costs[first]), least * (1 + TIE))
    return Selection(picks, least, settled=True)


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


def _pareto_lists(items: Items, limit: float, max_states: int, max_list: int) -> tuple[list[_Stage], _Incumbent | None]:
    """Return the stages by first item; with them an incumbent only if their size ended the search early."""
    count = len(items.choices)
    stages = [_Stage(np.zeros(0, np.int64), np.zeros(0))] * count
    stages.append(_Stage(np.zeros(1, np.int64), np.full(1, items.loss)))
    best: _Incumbent | None = None
    states = 0
    for first in range(count, -1, -1):
        corners = items.relaxation(first)
        if first < count:
            least = limit if best is None else min(limit, best.total)
            stages[first] = _merge(items, first, stages[first + 1], corners, least * (1 + SLACK))
        costs, losses = stages[first]
        # Any state and the dearest corner that still fits make a feasible selection.
        corner = corners[0].searchsorted(costs - items.capacity)
        totals = losses + corners[1][corner]
        total = float(totals.min())
        if best is None or total < best.total * (1 - TIE):
            state = int((totals <= total * (1 + TIE)).argmax())
            spent_before = -int(corners[0][corner[state]])
            best = _Incumbent(first, int(costs[state]), float(losses[state]), spent_before, total)
        states += len(costs)
        if first > 0 and (states > max_states or len(costs) > max_list):
            return stages, best
    return stages, None


def _merge(items: Items, item: int, after: _Stage, corners: tuple[Ints, Floats], limit: float) -> _Stage:
    """Return the Pareto list with one more item in front, less the states that cannot lead to a loss of `limit`."""

    def hopeful(costs: Ints, losses: Floats) -> NDArray[np.bool_]:
        # By descending cost, np.interp starts from the corner of less loss: no digits cancel.
        return losses + np.interp(costs - items.capacity, *corners) <= limit

    costs_of: list[Ints] = []
    losses_of: list[Floats] = []
    for cost, loss in items.choices[item]:
        fits = after.costs.searchsorted(items.capacity - cost, side="right")
        costs, losses = after.costs[:fits] + cost, after.losses[:fits] + loss
        if fits > LONG_LIST:
            chosen = hopeful(costs, losses)
            costs, losses = costs[chosen], losses[chosen]
        costs_of.append(costs)
        losses_of.append(losses)
    costs, losses = np.concatenate(costs_of), np.concatenate(losses_of)
    order = costs.argsort(kind="stable")  # merges runs that are sorted already
    costs, losses = costs[order], losses[order]
    better = np.empty(len(costs), dtype=bool)
    better[0] = True
    np.less(losses[1:], np.minimum.accumulate(losses)[:-1], out=better[1:])
    better[better] &= hopeful(costs[better], losses[better])
    costs, losses = costs[better], losses[better]
    last_of_cost = np.empty(len(costs), dtype=bool)
    last_of_cost[-1] = True
    np.not_equal(costs[1:], costs[:-1], out=last_of_cost[:-1])
    return _Stage(costs[last_of_cost], losses[last_of_cost])


def _walk(items: Items, stages: list[_Stage], first: int, cost: int, loss: float) -> list[int]:
    """Return the picks of items `first` and later that cost and lose no more than given, the dearest pick first."""
    loss *= 1 + 4 * len(items.choices) * np.finfo(float).eps  # the stages summed in another order
    picks = []
    for item in range(first, len(items.choices)):
        choices = items.choices[item]
        pick = next(
            pick
            for pick in reversed(range(len(choices)))
            if choices[pick].loss + stages[item + 1].least(cost - choices[pick].cost) <= loss
        )
        cost, loss = cost - choices[pick].cost, loss - choices[pick].loss
        picks.append(pick)
    return picks


def _complete(items: Items, stages: list[_Stage], incumbent: _Incumbent) -> list[int]:
    """Return the picks of an incumbent: a corner of the relaxation before its stage, a Pareto state from there on."""
    picks = [0] * incumbent.stage
    spent = 0
    for item, pick, cost in zip(items.step_item, items.step_pick, items.step_cost, strict=True):
        if item < incumbent.stage and spent < incumbent.spent_before:
            picks[item] = int(pick)
            spent += cost
    return picks + _walk(items, stages, incumbent.stage, incumbent.cost, incumbent.loss)
