"""The quadratic knapsack: choices whose losses do not add up, improved from a good start by exchange.

Reads costs (integers) and co-moments of all choices; returns the index of each item's choice, and a bound that no
selection passes. Does not know what an item is: no layers, no bits, no units.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvprof.allocate.solver import Knapsack, Solution

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

IMPROVES = 1e-9
"""The share of a selection's loss that an exchange must save to be made."""
NEAR = 1.5
"""A choice is tried while it loses less than so many times the least loss at its cost or below."""


class QuadraticKnapsack:
    """Items whose choices lose x' M x together, x the choices taken.

    An exchange gives one item another choice, or two items at once, so that one may pay for the other. The best one is
    made again and again, until none is left that saves anything.
    """

    def __init__(self, items: Sequence[Sequence[tuple[int, float]]], pairs: Floats) -> None:
        """items: for each item its choices' costs and losses. pairs: (C, C), M of all choices, item after item."""
        self._items = items
        self._pairs = pairs
        self._owners = np.repeat(np.arange(len(items)), [len(item) for item in items])
        self._starts = np.cumsum([0, *map(len, items)])[:-1]
        self._costs = np.array([cost for item in items for cost, _ in item], dtype=np.int64)
        self._tried = np.array([place for item in items for place in _near(item)]) if items else np.zeros(0, bool)

    def loss(self, choices: Sequence[int]) -> float:
        """Return what a selection loses."""
        places = self._starts + np.asarray(choices)
        return float(self._pairs[np.ix_(places, places)].sum())

    def improve(self, start: Solution, others: Sequence[Sequence[int]], capacity: int) -> Solution:
        """Return the best selection that exchange finds from a solution, and from others that fit and lose less.

        start: of the knapsack whose losses add up. Returns a solution that loses no more than any of these.
        """
        best = self._exchanged(start.choices, capacity)
        for other in others:
            if self.loss(other) < self.loss(best):
                best = self._exchanged(other, capacity)
        loss = self.loss(best)
        return Solution(best, sum(item[at][0] for item, at in zip(self._items, best, strict=True)), loss,
                        min(loss, self._bound(capacity)))  # fmt: skip

    def _exchanged(self, choices: Sequence[int], capacity: int) -> tuple[int, ...]:
        places = self._starts + np.asarray(choices)
        keep = self._tried.copy()
        keep[places] = True
        kept = np.flatnonzero(keep)
        pairs, owners, costs = self._pairs[np.ix_(kept, kept)], self._owners[kept], self._costs[kept]
        picks = np.searchsorted(kept, places)
        diagonal, every = np.diag(pairs), np.arange(len(kept))
        other = owners[:, None] != owners[None, :]
        while True:
            now = picks[owners]  # the choice that each choice would replace
            spare = capacity - int(costs[picks].sum())
            added = costs - costs[now]
            slopes = pairs[:, picks].sum(axis=1)
            change = 2 * (slopes - slopes[now]) + diagonal + diagonal[now] - 2 * pairs[every, now]
            rows = pairs - pairs[now]
            both = change[:, None] + change + 2 * (rows - rows[:, now])
            both[~other | (added[:, None] + added > spare)] = np.inf
            single = np.where(added <= spare, change, np.inf)
            one, two = int(single.argmin()), int(both.argmin())
            least = min(float(single[one]), float(both.flat[two]))
            if not least < -IMPROVES * abs(float(slopes[picks].sum())):
                return tuple((kept[picks] - self._starts).tolist())
            for place in (one,) if single[one] <= least else divmod(two, len(kept)):
                picks[owners[place]] = place

    def _bound(self, capacity: int) -> float:
        """Return what no selection loses less than: each choice beside the partners that suit it best.

        Source: P. C. Gilmore (1962) and E. L. Lawler (1963), on quadratic assignment.
        """
        floor, apart = self._apart
        return floor + apart.solve(capacity).lower_bound

    @cached_property
    def _apart(self) -> tuple[float, Knapsack]:
        """What all selections lose at least, and the knapsack of what is above it, its losses adding up."""
        least = np.minimum.reduceat(self._pairs, self._starts, axis=1)  # (C, items)
        least[np.arange(len(least)), self._owners] = 0.0
        losses = np.diag(self._pairs) + least.sum(axis=1)
        floors = np.minimum.reduceat(losses, self._starts)
        above = losses - floors[self._owners]  # the solver's losses are not negative
        items = [
            [(cost, float(above[first + place])) for place, (cost, _) in enumerate(item)]
            for first, item in zip(self._starts, self._items, strict=True)
        ]
        dearest = sum(max(cost for cost, _ in item) for item in items)
        return float(floors.sum()), Knapsack(items, dearest)


def _near(item: Sequence[tuple[int, float]]) -> list[bool]:
    """Return which choices lose little more than the best one that costs no more."""
    return [loss <= NEAR * min(other for spent, other in item if spent <= cost) for cost, loss in item]
