"""What a runtime can be told about its cache, as sets of assignments: the best of each within a capacity, exactly.

Reads costs and losses of each tensor's formats, by name; returns the name that each tensor gets. Does not know which
runtime has which constraints, nor how an assignment is written in its syntax (targets).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from kvprof.allocate.pareto import TIE
from kvprof.allocate.solver import MAX_UNITS, solve
from kvprof.errors import InfeasibleBudget, KvprofError
from kvprof.records.formats import TENSORS, TensorName

FULL = "full"

Place = tuple[int, TensorName]
"""A layer, and its keys or values."""
Assignment = Mapping[Place, str]
"""A format by name for each tensor."""


class Cell(NamedTuple):
    """One format of one tensor: its cost, in any integer unit, and its loss."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Table:
    """What each tensor may have. num_layers: of the model, those among them that no plan covers."""

    cells: Mapping[Place, Mapping[str, Cell]]
    num_layers: int

    @cached_property
    def layers(self) -> list[int]:
        """The layers that a plan covers, ascending."""
        return sorted({layer for layer, _ in self.cells})

    def total(self, assignment: Assignment) -> Cell:
        """Return the cost and the loss of an assignment."""
        chosen = [self.cells[place][name] for place, name in assignment.items()]
        return Cell(sum(cell.cost for cell in chosen), math.fsum(cell.loss for cell in chosen))

    def allows(self, assignment: Assignment) -> bool:
        """Whether every tensor may have what an assignment gives it."""
        return all(name in self.cells[place] for place, name in assignment.items())

    def with_losses(self, loss: Callable[[Cell], float]) -> Table:
        """Return the table with other losses."""
        return Table(
            {
                place: {name: Cell(cell.cost, loss(cell)) for name, cell in row.items()}
                for place, row in self.cells.items()
            },
            self.num_layers,
        )


def pairs_of(assignment: Assignment) -> dict[int, tuple[str, str]]:
    """Return the formats of each layer's keys and values, layers ascending."""
    layers = sorted({layer for layer, _ in assignment})
    return {layer: (assignment[layer, "key"], assignment[layer, "value"]) for layer in layers}


class Found(NamedTuple):
    """The best assignment within constraints. proven: whether no other of it loses less, for certain."""

    assignment: Assignment
    proven: bool = True


class Constraints(Protocol):
    """A set of assignments."""

    @property
    def words(self) -> str:
        """What can be expressed, in words."""

    def formats_of(self, tensor: TensorName) -> tuple[str, ...]:
        """Return the formats that keys or values can have, by name."""

    def choices(self) -> Mapping[str, tuple[str, ...]]:
        """Return what the runtime has a word for: the word, and a format, or that of keys and that of values."""

    def only(self, keeps: Callable[[str, TensorName], bool]) -> Self:
        """Return the constraints without some formats of keys, and of values."""

    def best(self, table: Table, capacity: int) -> Found | None:
        """Return the assignment of least loss whose cost fits, the cheapest of such; None where none fits."""

    def misfit(self, assignment: Assignment, num_layers: int) -> str | None:
        """Return why an assignment cannot be expressed, or None where it can."""


def reach(constraints: Constraints, table: Table) -> tuple[int, int] | None:
    """Return what the cheapest and the dearest assignment within constraints cost; None where the table allows none."""
    if not all(table.cells.values()):
        return None
    dearest_cell = max(cell.cost for row in table.cells.values() for cell in row.values())
    everything = len(table.cells) * dearest_cell
    ends = []
    for loss in (lambda cell: float(cell.cost), lambda cell: float(dearest_cell - cell.cost)):
        found = constraints.best(table.with_losses(loss), everything)
        if found is None:
            return None
        ends.append(table.total(found.assignment).cost)
    return ends[0], ends[1]


@dataclass(frozen=True)
class _OfFormats:
    """Constraints that name formats for keys and for values apart.

    absent: those that keys, or values, alone cannot have.
    """

    formats: tuple[str, ...]
    absent: frozenset[tuple[TensorName, str]] = field(default=frozenset(), kw_only=True)

    def formats_of(self, tensor: TensorName) -> tuple[str, ...]:
        """Return the formats that keys or values can have, by name."""
        return tuple(name for name in self.formats if (tensor, name) not in self.absent)

    def choices(self) -> Mapping[str, tuple[str, ...]]:
        """Return each format by its name."""
        return {name: (name,) for name in self.formats}

    def only(self, keeps: Callable[[str, TensorName], bool]) -> Self:
        """Return the constraints without some formats of keys, and of values."""
        left = tuple(name for name in self.formats if any(keeps(name, tensor) for tensor in TENSORS))
        absent = frozenset((tensor, name) for name in left for tensor in TENSORS if not keeps(name, tensor))
        return replace(self, formats=left, absent=absent)


@dataclass(frozen=True)
class _OfPairs:
    """Constraints with words for a format of keys and one of values together.

    pairs: the runtime's word to the formats of keys and values.
    """

    pairs: Mapping[str, tuple[str, str]]

    def formats_of(self, tensor: TensorName) -> tuple[str, ...]:
        """Return the formats that keys or values can have, by name."""
        return tuple(dict.fromkeys(pair[TENSORS.index(tensor)] for pair in self.pairs.values()))

    def choices(self) -> Mapping[str, tuple[str, ...]]:
        """Return each word with its formats."""
        return self.pairs

    def only(self, keeps: Callable[[str, TensorName], bool]) -> Self:
        """Return the constraints without some formats of keys, and of values."""
        return replace(self, pairs={word: pair for word, pair in self.pairs.items() if all(map(keeps, pair, TENSORS))})

    def word_for(self, pair: tuple[str, str]) -> str:
        """Return the first word for a pair of formats, which is one of `pairs`."""
        return next(word for word, known in self.pairs.items() if known == pair)


@dataclass(frozen=True)
class EachTensor(_OfFormats):
    """Any of its formats for each tensor."""

    words = "any format for each layer's keys and values"

    def best(self, table: Table, capacity: int) -> Found | None:
        """Solve one knapsack whose items are tensors."""
        return _knapsack(
            table,
            [
                [{place: name} for name in self.formats if name in row]
                for place, row in sorted(table.cells.items(), key=_by_tensor)
            ],
            capacity,
        )

    def misfit(self, assignment: Assignment, num_layers: int) -> str | None:
        """Return why an assignment cannot be expressed, or None where it can."""
        return _unknown(assignment, self.formats)


@dataclass(frozen=True)
class EachLayer(_OfPairs):
    """A pair of formats for each layer."""

    words = "one choice for each layer, keys and values alike"

    def best(self, table: Table, capacity: int) -> Found | None:
        """Solve one knapsack whose items are layers."""
        items = [
            [pair for key, value in self.pairs.values() if table.allows(pair := _layer(layer, key, value))]
            for layer in table.layers
        ]
        return _knapsack(table, items, capacity)

    def misfit(self, assignment: Assignment, num_layers: int) -> str | None:
        """Return why an assignment cannot be expressed, or None where it can."""
        for layer, pair in pairs_of(assignment).items():
            if pair not in self.pairs.values():
                return f"layer {layer} has keys in {pair[0]} and values in {pair[1]}; {self.words}"
        return None


@dataclass(frozen=True)
class OneOfAll(_OfPairs):
    """One pair of formats for all layers."""

    words = "one choice for all layers"

    def best(self, table: Table, capacity: int) -> Found | None:
        """Try each."""
        return _least(table, capacity, (Found(_everywhere(table, *pair)) for pair in self.pairs.values()))

    def misfit(self, assignment: Assignment, num_layers: int) -> str | None:
        """Return why an assignment cannot be expressed, or None where it can."""
        return _uneven(assignment) or EachLayer(self.pairs).misfit(assignment, num_layers)


@dataclass(frozen=True)
class KeysAndValues(_OfFormats):
    """One format for all keys, and one for all values."""

    words = "one format for all keys, one for all values"

    def best(self, table: Table, capacity: int) -> Found | None:
        """Try each pair."""
        pairs = itertools.product(self.formats, repeat=2)
        return _least(table, capacity, (Found(_everywhere(table, *pair)) for pair in pairs))

    def misfit(self, assignment: Assignment, num_layers: int) -> str | None:
        """Return why an assignment cannot be expressed, or None where it can."""
        return _unknown(assignment, self.formats) or _uneven(assignment)


@dataclass(frozen=True)
class SomeInFull(_OfPairs):
    """One pair of formats for all layers but some, which stay in full precision.

    ends: of each word, how many layers at either end of the model it leaves in full precision by itself; words that
    are not there leave none.
    """

    ends: Mapping[str, int]

    words = "one format for the layers, any of which can stay in 16 bits"

    def formats_of(self, tensor: TensorName) -> tuple[str, ...]:
        """Return the formats that keys or values can have, by name."""
        return (*super().formats_of(tensor), FULL)

    def best(self, table: Table, capacity: int) -> Found | None:
        """Solve for each pair a knapsack of two choices a layer."""
        found = []
        for word, pair in self.pairs.items():
            forced = self.forced(word, table.num_layers)
            items = []
            for layer in table.layers:
                quantized = [] if layer in forced else [_layer(layer, *pair)]
                items.append([each for each in (*quantized, _layer(layer, FULL, FULL)) if table.allows(each)])
            solution = _knapsack(table, items, capacity)
            if solution is not None:
                found.append(solution)
        return _least(table, capacity, found)

    def forced(self, word: str, num_layers: int) -> set[int]:
        """Return the layers that a word leaves in full precision by itself."""
        count = min(self.ends.get(word, 0), num_layers // 2)
        return {*range(count), *range(num_layers - count, num_layers)}

    def word_of(self, assignment: Assignment, num_layers: int) -> str | None:
        """Return the first word that can express an assignment, or None."""
        quantized = {layer: pair for layer, pair in pairs_of(assignment).items() if pair != (FULL, FULL)}
        for word, pair in self.pairs.items():
            if set(quantized.values()) <= {pair} and quantized.keys().isdisjoint(self.forced(word, num_layers)):
                return word
        return None

    def misfit(self, assignment: Assignment, num_layers: int) -> str | None:
        """Return why an assignment cannot be expressed, or None where it can."""
        if self.word_of(assignment, num_layers) is not None:
            return None
        return _mixed(assignment, self.pairs.values(), self.words) or (
            "the layers at either end of the model stay in 16 bits by themselves, and the plan quantizes one of them"
        )


class Ranges(NamedTuple):
    """A side of an assignment: the first layers have one format, the last another, the rest a third.

    first_layers, last_layers: counted over all layers of the model.
    """

    first: str
    first_layers: int
    last: str
    last_layers: int
    rest: str


@dataclass(frozen=True)
class FirstLastRest(_OfFormats):
    """For all keys, and for all values: a format for the first layers, one for the last, and one for the rest."""

    words = "keys and values apart: the first layers, the last ones and the rest, each in a format"

    def best(self, table: Table, capacity: int) -> Found | None:
        """Find the Pareto lists of keys and of values over all (first layers, last layers, formats), and join them.

        What a format costs and loses from one layer to another is summed up once for all such runs, so that any three
        ranges are three numbers: no difference is taken, in which a large loss would drown the small ones.
        """
        if sum(max(cell.cost for cell in row.values()) for row in table.cells.values() if row) >= MAX_UNITS:
            raise KvprofError("costs of so many digits are beyond exact arithmetic; take a rounder budget.")
        keys, values = (self._pareto(table, tensor) for tensor in TENSORS)
        if not keys.costs.size or not values.costs.size:
            return None
        partner = np.searchsorted(values.costs, capacity - keys.costs, side="right") - 1
        fits = np.flatnonzero(partner >= 0)
        if not fits.size:
            return None
        losses = keys.losses[fits] + values.losses[partner[fits]]
        costs = keys.costs[fits] + values.costs[partner[fits]]
        least = np.flatnonzero(losses <= losses.min() * (1 + TIE))
        best = fits[least[np.argmin(costs[least])]]
        return Found(self.assigned(table, {"key": keys.ranges(best), "value": values.ranges(partner[best])}))

    def assigned(self, table: Table, ranges: Mapping[TensorName, Ranges]) -> Assignment:
        """Return what ranges give each tensor."""
        found = {}
        for layer, tensor in sorted(table.cells, key=lambda place: (place[1], place[0])):
            side = ranges[tensor]
            if layer < side.first_layers:
                found[layer, tensor] = side.first
            else:
                found[layer, tensor] = side.last if layer >= table.num_layers - side.last_layers else side.rest
        return found

    def ranges_of(self, assignment: Assignment, tensor: TensorName, num_layers: int) -> Ranges | None:
        """Return the ranges that a side of an assignment is made of, the fewest and shortest; None where it is not."""
        layers = sorted(layer for layer, name in assignment if name == tensor)
        names = [assignment[layer, tensor] for layer in layers]
        runs = [(name, len(list(run))) for name, run in itertools.groupby(names)]
        if len(runs) > 3:
            return None
        if len(runs) == 1:
            return Ranges(names[0], 0, names[0], 0, names[0])
        if len(runs) == 2:  # a single flag, for the shorter run
            (first, length), (last, other) = runs
            if length <= other:
                return Ranges(first, layers[length - 1] + 1, last, 0, last)
            return Ranges(first, 0, last, num_layers - layers[length], first)
        (first, length), (rest, middle), (last, _) = runs
        return Ranges(first, layers[length - 1] + 1, last, num_layers - layers[length + middle], rest)

    def misfit(self, assignment: Assignment, num_layers: int) -> str | None:
        """Return why an assignment cannot be expressed, or None where it can."""
        if (problem := _unknown(assignment, self.formats)) is not None:
            return problem
        for tensor in TENSORS:
            if self.ranges_of(assignment, tensor, num_layers) is None:
                return (
                    f"the {tensor}s change their format more than twice from the first layer to the last; {self.words}"
                )
        return None

    def _pareto(self, table: Table, tensor: TensorName) -> _Side:
        layers = table.layers
        rows = [table.cells[layer, tensor] for layer in layers]
        names = [name for name in self.formats if any(name in row for row in rows)]
        nothing = Cell(0, 0.0)
        costs, losses = (
            {name: _runs([row.get(name, nothing)[part] for row in rows]) for name in names} for part in (0, 1)
        )
        absent = {name: _runs([name not in row for row in rows]) for name in names}
        count = len(layers)
        heads, tails = np.array([(head, tail) for head in range(count + 1) for tail in range(count + 1 - head)]).T
        cut = count - tails

        def summed(sums: Mapping[str, NDArray[Any]], first: str, last: str, rest: str) -> Any:
            return sums[first][0, heads] + sums[rest][heads, cut] + sums[last][cut, count]

        triples = [(first, last, rest) for first in names for last in names for rest in names]
        found = []
        for number, triple in enumerate(triples):
            first, last, rest = triple
            kept = summed(absent, *triple) == 0
            # A range of the format that the rest has is none.
            kept &= (heads == 0) | (first != rest)
            kept &= (tails == 0) | (last != rest)
            cost, loss = (summed(sums, *triple)[kept] for sums in (costs, losses))
            found.append(np.array([cost, loss, np.full(len(cost), number), heads[kept], tails[kept]]))
        columns = np.concatenate(found, axis=1) if found else np.zeros((5, 0))
        columns = columns[:, np.lexsort((columns[3] + columns[4], columns[1], columns[0]))]
        least = np.minimum.accumulate(columns[1])
        better = np.concatenate([[True], columns[1][1:] < least[:-1] * (1 - TIE)])[: columns.shape[1]]
        cost, loss, number, head, tail = columns[:, better]
        return _Side(cost, loss, number, head, tail, triples, layers, table.num_layers)


class _Side(NamedTuple):
    """Pareto ranges of all keys or all values: cost ascending, loss descending."""

    costs: NDArray[np.float64]
    losses: NDArray[np.float64]
    formats: NDArray[np.float64]
    heads: NDArray[np.float64]
    tails: NDArray[np.float64]
    names: list[tuple[str, str, str]]
    layers: list[int]
    num_layers: int

    def ranges(self, place: int) -> Ranges:
        """Return one of them, its layers counted over all of the model."""
        first, last, rest = self.names[int(self.formats[place])]
        head, tail = int(self.heads[place]), int(self.tails[place])
        return Ranges(
            first,
            self.layers[head - 1] + 1 if head else 0,
            last,
            self.num_layers - self.layers[-tail] if tail else 0,
            rest,
        )


def _runs(numbers: Sequence[float]) -> NDArray[np.float64]:
    """Return the sum of the numbers from one place up to another, at [from, to]."""
    sums = np.zeros((len(numbers) + 1, len(numbers) + 1))
    for start in range(len(numbers)):
        sums[start, start + 1 :] = np.cumsum(np.array(numbers[start:], dtype=np.float64))
    return sums


def _by_tensor(item: tuple[Place, object]) -> tuple[int, int]:
    (layer, tensor), _ = item
    return TENSORS.index(tensor), layer


def _layer(layer: int, key: str, value: str) -> dict[Place, str]:
    return {(layer, "key"): key, (layer, "value"): value}


def _everywhere(table: Table, key: str, value: str) -> dict[Place, str]:
    return {place: key if place[1] == "key" else value for place in table.cells}


def _least(table: Table, capacity: int, candidates: Iterable[Found]) -> Found | None:
    """Return the best of some assignments that are allowed and fit, the first of equally good ones."""
    allowed = [found for found in candidates if table.allows(found.assignment)]
    fitting = [(total, found) for found in allowed if (total := table.total(found.assignment)).cost <= capacity]
    if not fitting:
        return None
    least = min(total.loss for total, _ in fitting) * (1 + TIE)
    _, found = min((total.cost, place) for place, (total, _) in enumerate(fitting) if total.loss <= least)
    return fitting[found][1]._replace(proven=all(each.proven for each in allowed))


def _knapsack(table: Table, items: Sequence[Sequence[Assignment]], capacity: int) -> Found | None:
    """Return the best choice of every item together, or None where an item has none or none fits."""
    if not all(items):
        return None
    try:
        solution = solve([[table.total(choice) for choice in item] for item in items], capacity)
    except InfeasibleBudget:
        return None
    chosen: dict[Place, str] = {}
    for item, choice in zip(items, solution.choices, strict=True):
        chosen |= item[choice]
    return Found(chosen, solution.optimal)


def _unknown(assignment: Assignment, formats: Sequence[str]) -> str | None:
    for (layer, tensor), name in sorted(assignment.items(), key=lambda item: (item[0][0], item[0][1])):
        if name not in formats:
            return f"the {tensor} of layer {layer} has {name}; it knows {', '.join(formats)}"
    return None


def _uneven(assignment: Assignment) -> str | None:
    for tensor in TENSORS:
        found = {name for (_, side), name in assignment.items() if side == tensor}
        if len(found) > 1:
            return f"the {tensor}s have {', '.join(sorted(found))}; it takes one format for all {tensor}s"
    return None


def _mixed(assignment: Assignment, pairs: Iterable[tuple[str, str]], words: str) -> str | None:
    known = set(pairs) | {(FULL, FULL)}
    found: dict[tuple[str, str], int] = {}
    for layer, pair in pairs_of(assignment).items():
        if pair not in known:
            return f"layer {layer} has keys in {pair[0]} and values in {pair[1]}; {words}"
        found.setdefault(pair, layer)
    quantized = [f"{key} (layer {layer})" for (key, _), layer in found.items() if key != FULL]
    return f"its layers have {' and '.join(quantized)}; {words}" if len(quantized) > 1 else None
