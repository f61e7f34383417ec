"""The best assignment within each runtime's constraints is that of brute force over all that it can express."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprof.allocate.constraints import (
    FULL,
    Assignment,
    Cell,
    Constraints,
    EachLayer,
    EachTensor,
    FirstLastRest,
    KeysAndValues,
    OneOfAll,
    SomeInFull,
    Table,
    reach,
)

NAMES = ("a", "b", FULL)
PAIRS = {"one": ("a", "a"), "two": ("b", "a"), "none": (FULL, FULL)}
QUANTIZED = {"one": ("a", "a"), "two": ("b", "a")}
ENDS = {"two": 1}

GRAMMARS: list[Constraints] = [
    EachTensor(NAMES),
    EachLayer(PAIRS),
    OneOfAll(PAIRS),
    KeysAndValues(NAMES),
    SomeInFull(QUANTIZED, ENDS),
    FirstLastRest(NAMES),
]


def every_assignment(layers: list[int]) -> Iterator[dict[tuple[int, str], str]]:
    places = [(layer, tensor) for layer in layers for tensor in ("key", "value")]
    for names in itertools.product(NAMES, repeat=len(places)):
        yield dict(zip(places, names, strict=True))


def can_say(constraints: Constraints, assignment: Assignment, num_layers: int) -> bool:
    """Whether constraints can express an assignment: told anew, from what its runtime takes, not from `misfit`."""
    layers = sorted({layer for layer, _ in assignment})
    keys, values = ([assignment[layer, tensor] for layer in layers] for tensor in ("key", "value"))
    pairs = list(zip(keys, values, strict=True))
    if isinstance(constraints, EachTensor):
        return True
    if isinstance(constraints, EachLayer):
        return all(pair in PAIRS.values() for pair in pairs)
    if isinstance(constraints, OneOfAll):
        return len(set(pairs)) == 1 and pairs[0] in PAIRS.values()
    if isinstance(constraints, KeysAndValues):
        return len(set(keys)) == len(set(values)) == 1
    if isinstance(constraints, SomeInFull):
        for word, pair in QUANTIZED.items():
            count = min(ENDS.get(word, 0), num_layers // 2)  # as vLLM has it
            ends = {*range(count), *range(num_layers - count, num_layers)}
            found = [(FULL, FULL) if layer in ends else None for layer in layers]
            if all(
                mine == (FULL, FULL) or (forced is None and mine == pair)
                for mine, forced in zip(pairs, found, strict=True)
            ):
                return True
        return False
    for side in (keys, values):
        changes = sum(before != after for before, after in itertools.pairwise(side))
        if changes > 2:
            return False
    return True


@st.composite
def tables(draw: st.DrawFn) -> Table:
    num_layers = draw(st.integers(1, 4))
    layers = sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=3)))
    widths = {"key": draw(st.sampled_from([1, 3])), "value": draw(st.sampled_from([1, 2]))}
    costs = {"a": 4, "b": 7, FULL: 16}
    cells = {}
    for layer in layers:
        for tensor in ("key", "value"):
            row = {name: Cell(widths[tensor] * costs[name], draw(st.floats(0, 1, width=32))) for name in ("a", "b")}
            row[FULL] = Cell(widths[tensor] * 16, 0.0)
            if draw(st.integers(0, 9)) == 0:
                row.pop(draw(st.sampled_from(["a", "b"])))
            cells[layer, tensor] = row
    return Table(cells, num_layers)


@pytest.mark.parametrize("constraints", GRAMMARS, ids=lambda constraints: type(constraints).__name__)
@given(table=tables(), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_best_assignment_is_that_of_brute_force(constraints: Constraints, table: Table, share: float) -> None:
    allowed = [
        each
        for each in every_assignment(table.layers)
        if table.allows(each) and can_say(constraints, each, table.num_layers)
    ]
    ends = reach(constraints, table)
    if not allowed:
        assert ends is None
        return
    costs = [table.total(each).cost for each in allowed]
    assert ends == (min(costs), max(costs))
    capacity = math.floor(min(costs) - 1 + share * (max(costs) - min(costs) + 2))
    fitting = [total for each in allowed if (total := table.total(each)).cost <= capacity]
    found = constraints.best(table, capacity)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert found.proven
    assert set(found.assignment) == set(table.cells)
    assert can_say(constraints, found.assignment, table.num_layers)
    total = table.total(found.assignment)
    assert total.cost <= capacity
    assert total.loss == pytest.approx(min(each.loss for each in fitting), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("constraints", GRAMMARS, ids=lambda constraints: type(constraints).__name__)
@pytest.mark.parametrize("layers", [[0], [0, 1], [0, 2, 3], [1, 2]])
def test_what_cannot_be_said_is_refused_and_nothing_else(constraints: Constraints, layers: list[int]) -> None:
    for assignment in every_assignment(layers):
        assert (constraints.misfit(assignment, 4) is None) == can_say(constraints, assignment, 4), assignment


def test_ranges_are_counted_over_all_layers_of_the_model() -> None:
    constraints = FirstLastRest(NAMES)
    names = {1: "a", 3: "b", 5: FULL}  # layers 0, 2, 4, 6 and 7 are not planned
    assignment = {(layer, tensor): name for layer, name in names.items() for tensor in ("key", "value")}
    ranges = constraints.ranges_of(assignment, "key", 8)
    assert ranges is not None
    assert (ranges.first, ranges.first_layers) == ("a", 2)
    assert (ranges.last, ranges.last_layers) == (FULL, 3)
    assert ranges.rest == "b"


def test_one_huge_loss_drowns_no_other() -> None:
    losses = [1e17, 1, 5, 1, 5]
    cells = {}
    for layer, loss in enumerate(losses):
        cells[layer, "key"] = {"a": Cell(4, float(loss)), "b": Cell(8, 0.0)}
        cells[layer, "value"] = {"a": Cell(4, 0.0)}
    found = FirstLastRest(("a", "b")).best(Table(cells, 5), 4 * 10 + 4 * 4)
    assert found is not None
    assert Table(cells, 5).total(found.assignment).loss == 1


@given(table=tables())
@settings(max_examples=100, deadline=None)
def test_of_equal_losses_the_cheapest_is_taken(table: Table) -> None:
    flat = table.with_losses(lambda cell: 0.1 if cell.cost < 10 else 0.3)  # sums that differ in the last place
    for constraints in GRAMMARS:
        allowed = [
            table.total(each)._replace(loss=flat.total(each).loss)
            for each in every_assignment(table.layers)
            if table.allows(each) and can_say(constraints, each, table.num_layers)
        ]
        found = constraints.best(flat, 10**6)
        assert (found is None) == (not allowed)
        if found is not None:
            least = min(each.loss for each in allowed)
            assert table.total(found.assignment).cost == min(
                each.cost for each in allowed if each.loss <= least * (1 + 1e-12)
            )


def test_eighty_layers_of_eight_formats_are_solved_at_once() -> None:
    names = tuple("abcdefgh")
    cells = {
        (layer, tensor): {
            name: Cell(45 + 5 * rank, math.exp(-rank) * (1 + math.sin(layer))) for rank, name in enumerate(names)
        }
        for layer in range(80)
        for tensor in ("key", "value")
    }
    table = Table(cells, 80)
    found = FirstLastRest(names).best(table, 160 * 60)
    assert found is not None
    assert table.total(found.assignment).cost <= 160 * 60
