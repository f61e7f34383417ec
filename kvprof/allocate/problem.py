"""The exact problem: which format for each tensor, at what cost and loss, handed to the solver and read back.

Reads Scores and what a plan may choose from; writes BitPlans. Does not know how the knapsack is solved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from kvprof.allocate.budget import Limit
from kvprof.allocate.candidates import Allowed, candidates_of, narrowing
from kvprof.allocate.measured import Measured
from kvprof.allocate.pricing import Prices, check_reach, price
from kvprof.allocate.solver import Solution
from kvprof.allocate.task import PlanTask
from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.records.plan import BitPlan, Solver, Window
from kvprof.records.scores import LOSS_INCREASE, Scores

TIES = ("key-value",)


class _Item(NamedTuple):
    """Tensors that are chosen for together, and what they may have: for each choice, a candidate of each tensor."""

    tensors: tuple[int, ...]
    choices: Sequence[tuple[int, ...]]


class ExactProblem:
    """Scores made into a knapsack whose items are tensors, or layers where keys and values are tied."""

    def __init__(
        self,
        scores: Scores,
        limit: Limit,
        metric: str,
        allowed: Allowed,
        tie: str | None = None,
        window: Window | None = None,
        command: str | None = None,
    ) -> None:
        """limit: its unit, context and batch say what costs are counted in; its amount is not read here.

        tie: "key-value" gives keys and values of a layer codes of the same width.
        Raises as `candidates_of` and `price` do, and UsageError for tied tensors that have no width in common.
        """
        if tie is not None and tie not in TIES:
            raise UsageError(f"unknown --tie {tie!r}: {did_you_mean(tie, TIES)}")
        self.metric = metric
        self.limit = limit
        self.task = PlanTask(scores, window, command)
        self.candidates = candidates_of(scores, self.task.tensors, metric, allowed)
        self._formats = [[choice.format for choice in choices] for choices in self.candidates]
        self.prices: Prices = price(self.task.tensors, self._formats, limit, self.task.window, scores.geometry)
        self.narrowed = [*narrowing(allowed), *(["--tie"] if tie else [])]
        """The options that left something out of the choice, for messages."""
        self._items = self._tied() if tie else self._apart()
        self.items = [[self._total(item, choice) for choice in item.choices] for item in self._items]
        """What the solver is given: for each item its choices' costs and losses."""
        most = max(loss for item in self.items for _, loss in item)
        if not math.isfinite(most * len(self.items)):
            raise InvalidFile(f"{metric} reaches {most}, too large to add up; measure it again.")

    @property
    def groups(self) -> list[_Item]:
        """What each of `items` is: the tensors that are chosen for together, and the candidates of every choice."""
        return self._items

    @cached_property
    def cheapest(self) -> int:
        """What the cheapest plan costs, in units of `prices`."""
        return sum(min(cost for cost, _ in item) for item in self.items)

    @cached_property
    def dearest(self) -> int:
        """What the dearest plan costs, in units of `prices`."""
        return sum(max(cost for cost, _ in item) for item in self.items)

    def capacity(self, limit: Limit) -> int:
        """Return what all costs together may be; raises InfeasibleBudget for a limit that no plan meets."""
        self.check_reach(limit)
        return self.prices.capacity(limit.amount)

    def check_reach(self, limit: Limit, option: str | None = None) -> None:
        """Raise InfeasibleBudget for a limit that no plan meets. option: that it was given with, for the message."""
        low, high = self.prices.amount(self.cheapest), self.prices.amount(self.dearest)
        check_reach(limit, low, high, self._formats, self.metric == LOSS_INCREASE, self.narrowed, option)

    def chosen(self, solution: Solution) -> list[Measured]:
        """Return what a solution gives each tensor."""
        found: dict[int, Measured] = {}
        for item, choice in zip(self._items, solution.choices, strict=True):
            for tensor, candidate in zip(item.tensors, item.choices[choice], strict=True):
                found[tensor] = self.candidates[tensor][candidate]
        return [found[tensor] for tensor in range(len(self.candidates))]

    def plan(self, solution: Solution, limit: Limit | None) -> BitPlan:
        """Return a solution as a plan. limit: what was asked for, where it was a budget."""
        parts = self.chosen(solution)
        formats = [part.format for part in parts]
        return self.task.plan(formats, self.solver(parts, solution.optimal), limit)

    def solver(self, parts: Sequence[Measured], optimal: bool) -> Solver:
        """Return the record of how a plan of these formats was found."""
        if self.metric == LOSS_INCREASE:
            return self.task.predicted("exact", parts, optimal)
        return self.task.solver("exact", self.metric, [part.format for part in parts], optimal)

    def _total(self, item: _Item, choice: tuple[int, ...]) -> tuple[int, float]:
        pairs = list(zip(item.tensors, choice, strict=True))
        cost = sum(self.prices.costs[tensor][candidate] for tensor, candidate in pairs)
        return cost, sum(self.candidates[tensor][candidate].loss for tensor, candidate in pairs)

    def _apart(self) -> list[_Item]:
        return [
            _Item((place,), [(candidate,) for candidate in range(len(choices))])
            for place, choices in enumerate(self.candidates)
        ]

    def _tied(self) -> list[_Item]:
        """Return an item for each layer: the pairs of formats for its keys and values that have equally wide codes."""
        place_of = {(tensor.layer, tensor.name): place for place, tensor in enumerate(self.task.tensors)}
        items = []
        for layer in sorted({tensor.layer for tensor in self.task.tensors}):
            places = (place_of[layer, "key"], place_of[layer, "value"])
            keys, values = (self._formats[place] for place in places)
            pairs = [
                (key, value)
                for key, value in itertools.product(range(len(keys)), range(len(values)))
                if keys[key].bits == values[value].bits
            ]
            if not pairs:
                widths = [", ".join(map(str, sorted({form.bits for form in forms}))) for forms in (keys, values)]
                raise UsageError(
                    f"--tie key-value: the keys and values of layer {layer} have no width in common.\n"
                    f"  keys may have {widths[0]} bits, values {widths[1]}: loosen a --pin, --bits, --formats or "
                    "--min-key-bits"
                )
            items.append(_Item(places, pairs))
        return items
