"""The exact problem: which format for each tensor, at what cost and loss, handed to the solver and read back.

Reads Scores and what a plan may choose from; writes BitPlans. Does not know how the knapsack is solved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from kvprof.allocate.budget import Limit
from kvprof.allocate.candidates import Allowed, candidates_of, narrowing
from kvprof.allocate.costs import Prices, check_reach, price
from kvprof.allocate.exchange import Floats, QuadraticKnapsack
from kvprof.allocate.losses import PredictedLoss, kl_factor
from kvprof.allocate.prediction import prediction_of
from kvprof.allocate.solver import Knapsack, Solution, solve
from kvprof.allocate.task import PlanTask, Selection
from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.records.formats import TENSORS
from kvprof.records.plan import BitPlan, Solver, Window
from kvprof.records.scores import LOSS_INCREASE, Scores

TIES = ("key-value",)
FOLDS = 4
"""Parts of the sequences that are left out in turn."""
FEWEST_FOLDS = 4
"""Sequences that a plan can be cross-fitted with."""


class _Item(NamedTuple):
    """Tensors that are chosen for together, and what they may have: for each choice, a candidate of each tensor."""

    tensors: tuple[int, ...]
    choices: Sequence[tuple[int, ...]]


class _Fold(NamedTuple):
    """Sequences left out, the rest, and the problem as these make it."""

    left_out: list[int]
    rest: list[int]
    knapsack: Knapsack


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
    ) -> None:
        """limit: its unit, context and batch say what costs are counted in; its amount is not read here.

        tie: "key-value" gives keys and values of a layer codes of the same width.
        Raises as `candidates_of` and `price` do, and UsageError for tied tensors that have no width in common.
        """
        if tie is not None and tie not in TIES:
            raise UsageError(f"unknown --tie {tie!r}: {did_you_mean(tie, TIES)}")
        self.metric = metric
        self.limit = limit
        self.task = PlanTask(scores, window)
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

    def best(self, capacity: int) -> Solution:
        """Return the best selection that is found within a capacity: where losses add up, the best that there is."""
        return self.improved(solve(self.items, capacity), capacity)

    def improved(self, solution: Solution, capacity: int) -> Solution:
        """Return a solution of the losses alone, improved by what tensors share, where the scores tell."""
        if self._quadratic is None:
            return solution
        return self._quadratic.improve(solution, self._pairs_within(capacity), capacity)

    def selection(self, capacity: int) -> Selection | None:
        """Return how much more a plan of this capacity costs on sequences that had no part in choosing it.

        Cross-fitting: for each of FOLDS parts of the sequences a plan is chosen by the others, and predicted by both.
        None where there are too few sequences, or the scores hold none.
        """
        if not self._folds:
            return None
        moments, more = self.task.co_moments, []
        assert moments is not None
        for left_out, rest, knapsack in self._folds:
            found = knapsack.solve(capacity)
            samples = moments.samples(self._places_of(found))
            more.append(float(samples[left_out].mean() - samples[rest].mean()))
        mean = fmean(more)
        return Selection(max(0.0, mean), stdev(more) / math.sqrt(len(more)))

    def chosen(self, solution: Solution) -> list[PredictedLoss]:
        """Return what a solution gives each tensor."""
        found: dict[int, PredictedLoss] = {}
        for item, choice in zip(self._items, solution.choices, strict=True):
            for tensor, candidate in zip(item.tensors, item.choices[choice], strict=True):
                found[tensor] = self.candidates[tensor][candidate]
        return [found[tensor] for tensor in range(len(self.candidates))]

    def plan(self, solution: Solution, limit: Limit | None, optimal: bool | None = None) -> BitPlan:
        """Return a solution as a plan.

        limit: what was asked for, where it was a budget. optimal: by default whether the solution is the best of its
        capacity.
        """
        formats = [part.format for part in self.chosen(solution)]
        return self.task.plan(formats, self.solver(solution, optimal), limit)

    @property
    def adds_up(self) -> bool:
        """Whether what a plan loses is the sum over its tensors."""
        return self._quadratic is None

    def predicted(self, solution: Solution) -> float:
        """Return a solution's predicted KL, the factor in it, but for what choosing it made of noise."""
        effects = None if self.task.co_moments is None else self.task.scores.effects
        nats = prediction_of(self.chosen(solution), effects, 1.0).kl_nats
        assert nats is not None
        return kl_factor(self.task.scores) * nats

    def solver(self, solution: Solution, optimal: bool | None = None) -> Solver:
        """Return the record of how a solution was found. optimal: as `plan` has it."""
        parts = self.chosen(solution)
        bound = None if self.adds_up or optimal is not None else solution.lower_bound
        optimal = solution.optimal if optimal is None else optimal
        if self.metric == LOSS_INCREASE:
            return self.task.predicted("exact", parts, optimal, bound, self.selection(solution.cost))
        return self.task.solver("exact", self.metric, [part.format for part in parts], optimal)

    @cached_property
    def _places(self) -> list[list[list[int]]]:
        """For each item and choice, the place of each tensor's format among the co-moments."""
        moments = self.task.co_moments
        assert moments is not None
        found = [
            [moments.place(tensor, choice.format) for choice in choices]
            for tensor, choices in zip(self.task.tensors, self.candidates, strict=True)
        ]
        return [
            [
                [place for tensor, candidate in zip(item.tensors, choice, strict=True)
                 if (place := found[tensor][candidate]) is not None]  # every candidate was scored, or is full
                for choice in item.choices
            ]
            for item in self._items
        ]  # fmt: skip

    def _places_of(self, solution: Solution) -> list[int]:
        return [place for row, choice in zip(self._places, solution.choices, strict=True) for place in row[choice]]

    @cached_property
    def _quadratic(self) -> QuadraticKnapsack | None:
        """The problem with what tensors share; None where that is nothing, or unknown."""
        moments = self.task.co_moments if self.metric == LOSS_INCREASE else None
        if moments is None:
            return None
        return QuadraticKnapsack(self.items, self._joined(moments.shrunk))

    def _joined(self, pairs: Floats) -> Floats:
        """Return co-moments of choices, item after item, from those of formats."""
        columns = list(zip(*(choice for row in self._places for choice in row), strict=True))
        parts = [np.array(column) for column in columns]  # one for each tensor of an item
        joined: Floats = np.sum([pairs[np.ix_(one, other)] for one in parts for other in parts], axis=0)
        return joined

    @cached_property
    def _folds(self) -> list[_Fold]:
        moments = self.task.co_moments if self.metric == LOSS_INCREASE else None
        if moments is None or moments.sequences < FEWEST_FOLDS:
            return []
        calibration = self.task.scores.calibration
        source_of = (calibration.source_of if calibration else None) or (0,) * moments.sequences
        by_source = sorted(range(moments.sequences), key=lambda place: source_of[place])  # each fold has of every text
        folds = []
        for fold in range(min(FOLDS, moments.sequences)):
            left_out = sorted(by_source[fold::FOLDS])
            rest = [place for place in range(moments.sequences) if place not in left_out]
            losses = moments.losses(rest)
            items = [
                [(cost, float(losses[places].sum())) for (cost, _), places in zip(item, row, strict=True)]
                for item, row in zip(self.items, self._places, strict=True)
            ]
            folds.append(_Fold(left_out, rest, Knapsack(items, self.dearest)))
        return folds

    @cached_property
    def _uniform(self) -> list[tuple[tuple[str, str], list[int]]]:
        """Every pair of one format for all keys and one for all values that can be chosen, with its choices."""
        names: list[list[dict[str, str]]] = [
            [
                {
                    self.task.tensors[tensor].name: self.candidates[tensor][candidate].format.name
                    for tensor, candidate in zip(item.tensors, choice, strict=True)
                }
                for choice in item.choices
            ]
            for item in self._items
        ]
        own = [
            dict.fromkeys(name for row in names for choice in row if (name := choice.get(tensor))) for tensor in TENSORS
        ]
        found = []
        for key, value in itertools.product(*own):
            wanted = {"key": key, "value": value}
            choices = [
                next((at for at, choice in enumerate(row) if choice.items() <= wanted.items()), None) for row in names
            ]
            known = [choice for choice in choices if choice is not None]
            if len(known) == len(choices):
                found.append(((key, value), known))
        return found

    def _pairs_within(self, capacity: int) -> list[list[int]]:
        """Return the pair that fits and is predicted to lose the least, where there is one."""
        return next(([choices] for _, cost, choices in self._ranked if cost <= capacity), [])

    @cached_property
    def _ranked(self) -> list[tuple[float, int, list[int]]]:
        """What each uniform pair loses and costs, with its choices; the one that loses the least first."""
        assert self._quadratic is not None
        return sorted((self._quadratic.loss(choices), self._cost(choices), choices) for _, choices in self._uniform)

    def best_pair(self, capacity: int) -> tuple[str, float] | None:
        """Return the best uniform pair that fits, as `int3g64/rot2`, and the nats a token that it is predicted to lose.

        None where no pair fits, or the metric predicts no nats.
        """
        if self.metric != LOSS_INCREASE:
            return None
        fitting = [
            (self.predicted(Solution(tuple(choices), 0, 0.0, 0.0)), "/".join(names))
            for names, choices in self._uniform
            if self._cost(choices) <= capacity
        ]
        if not fitting:
            return None
        nats, name = min(fitting)
        return name, nats

    def _cost(self, choices: Sequence[int]) -> int:
        return sum(item[choice][0] for item, choice in zip(self.items, choices, strict=True))

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
