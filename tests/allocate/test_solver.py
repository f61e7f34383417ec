"""The solver against brute force, SciPy's MILP and its own tie rule."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from kvprof.allocate.solver import Knapsack, Solution, frontier, solve
from kvprof.errors import InfeasibleBudget, KvprofError

Items = list[list[tuple[int, float]]]
BITS = (1, 2, 3, 4, 6, 8)


def by_brute_force(items: Items, capacity: int) -> tuple[int, list[int]] | None:
    """Return (cost, costs by item) that the tie rule wants, judged over all selections in exact arithmetic."""
    feasible = [s for s in itertools.product(*items) if sum(cost for cost, _ in s) <= capacity]
    if not feasible:
        return None
    loss_of = {s: sum(Fraction(loss) for _, loss in s) for s in feasible}
    least = min(loss_of.values())
    tied = [s for s in feasible if loss_of[s] <= least * (1 + Fraction(1, 10**12))]
    cheapest = min(sum(cost for cost, _ in s) for s in tied)
    best = max([cost for cost, _ in s] for s in tied if sum(cost for cost, _ in s) == cheapest)
    return cheapest, best


def by_milp(items: Items, capacity: int) -> float:
    """Return the least loss that SciPy's MILP finds."""
    flat = [(row, cost, loss) for row, item in enumerate(items) for cost, loss in item]
    rows, costs, losses = (np.array(column, dtype=float) for column in zip(*flat, strict=True))
    one_each = coo_array((np.ones(len(flat)), (rows.astype(int), np.arange(len(flat)))))
    result = milp(
        losses / losses.max() * 1e6,  # far above HiGHS's absolute gap of 1e-6
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None, :], -np.inf, capacity)],
        options={"mip_rel_gap": 1e-9},
    )
    assert result.success
    return math.fsum(losses[result.x > 0.5])


def bit_items(widths: np.ndarray, scores: np.ndarray, bits: tuple[int, ...] = BITS) -> Items:
    return [
        [(int(width) * b, float(score) ** 2 * 4.0**-b) for b in bits]
        for width, score in zip(widths, scores, strict=True)
    ]


def check(items: Items, capacity: int, solution: Solution) -> None:
    """Assert that a solution is what it says it is."""
    picked = [item[choice] for item, choice in zip(items, solution.choices, strict=True)]
    assert sum(cost for cost, _ in picked) == solution.cost <= capacity
    assert math.isclose(math.fsum(loss for _, loss in picked), solution.loss, rel_tol=1e-15)
    assert solution.lower_bound <= solution.loss


small_items = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20).map(float)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@settings(max_examples=400, deadline=None)
@given(items=small_items, capacity=st.integers(0, 50))
def test_finds_what_brute_force_finds_ties_included(items: Items, capacity: int) -> None:
    expected = by_brute_force(items, capacity)
    if expected is None:
        with pytest.raises(InfeasibleBudget):
            solve(items, capacity)
        return
    solution = solve(items, capacity)
    check(items, capacity, solution)
    assert solution.optimal
    assert (solution.cost, [item[c][0] for item, c in zip(items, solution.choices, strict=True)]) == expected


@settings(max_examples=200, deadline=None)
@given(items=small_items, capacity=st.integers(0, 50), factor=st.sampled_from([1e-5, 1e5, 0.1, 1 / 3, 7.7e-200, 1e200]))
def test_a_common_factor_in_the_losses_changes_no_choice(items: Items, capacity: int, factor: float) -> None:
    if sum(min(cost for cost, _ in item) for item in items) > capacity:
        return
    scaled = [[(cost, loss * factor) for cost, loss in item] for item in items]
    assert solve(scaled, capacity).choices == solve(items, capacity).choices


@settings(max_examples=200, deadline=None)
@given(
    exponents=st.lists(st.integers(-30, 0), min_size=1, max_size=5),
    widths=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    share=st.fractions(0, 1),
)
def test_losses_that_span_thirty_decades_stay_exact(exponents: list[int], widths: list[int], share: Fraction) -> None:
    items = [[(w * b, 10.0**e * 4.0**-b) for b in (1, 2, 4)] for e, w in zip(exponents, widths, strict=False)]
    used = sum(widths[: len(exponents)])
    capacity = used + math.floor(share * 3 * used)
    solution = solve(items, capacity)
    expected = by_brute_force(items, capacity)
    assert (solution.cost, [item[c][0] for item, c in zip(items, solution.choices, strict=True)]) == expected


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_milp_on_160_items_of_uneven_width(seed: int) -> None:
    rng = np.random.default_rng(seed)
    widths = rng.integers(1, 4097, 160)
    items = bit_items(widths, rng.lognormal(0, 1, 160))
    capacity = int(widths.sum() * rng.uniform(1.5, 5))
    solution = solve(items, capacity)
    check(items, capacity, solution)
    assert solution.optimal
    assert solution.loss == pytest.approx(by_milp(items, capacity), rel=1e-7)


def test_agrees_with_milp_on_concave_and_crossing_choices() -> None:
    rng = np.random.default_rng(0)
    items = [[(int(rng.integers(1, 500)), float(rng.random())) for _ in range(8)] for _ in range(60)]
    capacity = sum(min(cost for cost, _ in item) for item in items) * 3
    solution = solve(items, capacity)
    check(items, capacity, solution)
    assert solution.loss == pytest.approx(by_milp(items, capacity), rel=1e-7)


def test_126_layers_of_20_formats_are_proven_optimal() -> None:
    rng = np.random.default_rng(0)
    items = [
        list(zip(np.sort(rng.integers(1, 4097, 20)).tolist(), np.sort(rng.random(20))[::-1].tolist(), strict=True))
        for _ in range(252)
    ]
    capacity = sum(item[0][0] + item[-1][0] for item in items) // 3
    solution = solve(items, capacity)
    check(items, capacity, solution)
    assert solution.optimal


uneven = np.random.default_rng(5).integers(1, 4097, 160)
long_costs = np.random.default_rng(6).integers(10**7, 10**8, 160)


@pytest.mark.parametrize("widths", [uneven, long_costs, np.full(160, 1024)], ids=["uneven", "long", "even"])
@pytest.mark.parametrize("kind", ["equal", "zero", "proportional", "linear"])
def test_degenerate_losses_end_soon_and_close_to_the_bound(widths: np.ndarray, kind: str) -> None:
    if kind == "linear":  # every selection that fills the capacity is optimal: a subset-sum problem
        items = [[(int(w) * b, float(w) * (8 - b)) for b in BITS] for w in widths]
    else:
        scores = {"equal": np.full(160, 3.7), "zero": np.zeros(160), "proportional": np.sqrt(widths)}[kind]
        items = bit_items(widths, scores)
    capacity = int(widths.sum() * 5 // 2)
    solution = solve(items, capacity)
    check(items, capacity, solution)
    assert solution.loss <= solution.lower_bound * (1 + 1e-6)
    assert solution.optimal or (widths is long_costs and kind in ("proportional", "linear"))


def test_a_common_factor_in_the_costs_changes_no_choice() -> None:
    items = bit_items(np.array([3, 5, 7, 11]), np.array([1.0, 2.0, 0.5, 3.0]))
    factor = 10**12 + 39
    dear = [[(cost * factor, loss) for cost, loss in item] for item in items]
    assert solve(dear, 70 * factor + 1).choices == solve(items, 70).choices


def test_equal_scores_give_the_first_items_more() -> None:
    items = bit_items(np.ones(6), np.full(6, 0.3), bits=(1, 2, 3))
    assert solve(items, 9).choices == (1, 1, 1, 0, 0, 0)


def test_all_zero_losses_take_the_cheapest_choices() -> None:
    assert solve(bit_items(np.ones(4), np.zeros(4)), 20).choices == (0, 0, 0, 0)


def test_capacity_that_buys_nothing_more_is_left_over() -> None:
    assert solve([[(1, 5.0), (3, 0.0), (9, 0.0)], [(2, 1.0)]], 100).cost == 5


def test_no_items_cost_nothing() -> None:
    assert solve([], 0) == Solution(choices=(), cost=0, loss=0.0, lower_bound=0.0)


def test_a_single_choice_is_taken_even_at_the_brim() -> None:
    assert solve([[(4, 2.0)], [(6, 0.0)]], 10).choices == (0, 0)


def test_refuses_what_has_no_answer() -> None:
    with pytest.raises(InfeasibleBudget, match="10, more than the capacity of 9"):
        solve([[(4, 2.0)], [(6, 0.0)]], 9)
    with pytest.raises(ValueError, match="no choices"):
        solve([[(1, 1.0)], []], 9)
    for loss in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="negative or not finite"):
            solve([[(1, loss)]], 9)
    with pytest.raises(KvprofError, match="beyond exact arithmetic"):
        solve([[(0, 1.0), (10**20, 0.5)], [(0, 1.0), (10**20 + 1, 0.5)]], 10**21)


# Many capacities


def model_items(seed: int = 0, layers: int = 126, formats: int = 20) -> Items:
    """The keys and values of a model whose layers are of uneven width, each in so many formats."""
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.integers(1, 4097, (2 * layers, formats)), axis=1)
    losses = -np.sort(-rng.lognormal(0, 1, costs.shape), axis=1)
    return [list(zip(*item, strict=True)) for item in zip(costs.tolist(), losses.tolist(), strict=True)]


def capacities(items: Items, number: int) -> list[int]:
    """Evenly spaced from what the cheapest choices cost to what the dearest do."""
    low, high = (sum(end(cost for cost, _ in item) for item in items) for end in (min, max))
    return [low + (high - low) * step // (number - 1) for step in range(number)]


@settings(max_examples=300, deadline=None)
@given(items=small_items, wanted=st.lists(st.integers(0, 60), max_size=6))
def test_a_frontier_is_what_solve_finds_at_each_capacity(items: Items, wanted: list[int]) -> None:
    least = sum(min(cost for cost, _ in item) for item in items)
    wanted = [least + capacity for capacity in wanted]
    assert frontier(items, wanted) == [solve(items, capacity) for capacity in wanted]


@settings(max_examples=150, deadline=None)
@given(items=small_items, steps=st.integers(1, 20))
def test_a_frontier_is_what_brute_force_finds_ties_included(items: Items, steps: int) -> None:
    wanted = capacities(items, steps + 1)
    for capacity, solution in zip(wanted, frontier(items, wanted), strict=True):
        found = [item[choice][0] for item, choice in zip(items, solution.choices, strict=True)]
        assert (solution.cost, found) == by_brute_force(items, capacity)
        assert solution.optimal


def test_a_frontier_of_126_layers_of_20_formats_is_solve_at_each_capacity_and_proven() -> None:
    items = model_items()
    wanted = capacities(items, 41)
    found = frontier(items, wanted)
    assert all(solution.optimal for solution in found)
    assert found[::5] == [solve(items, capacity) for capacity in wanted[::5]]
    losses = [solution.loss for solution in found]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.35, 0.8])
def test_agrees_with_milp_on_126_layers_of_20_formats(share: float) -> None:
    items = model_items(seed=3)
    low, high = capacities(items, 2)
    capacity = low + int((high - low) * share)
    solution = solve(items, capacity)
    check(items, capacity, solution)
    assert solution.optimal
    assert solution.loss == pytest.approx(by_milp(items, capacity), rel=1e-7)


def test_a_frontier_of_formats_in_proportion_to_bits_agrees_with_milp() -> None:
    rng = np.random.default_rng(9)
    items = bit_items(rng.choice([192, 512, 1024], 60), rng.lognormal(0, 1, 60))
    wanted = capacities(items, 9)
    for capacity, solution in zip(wanted, frontier(items, wanted), strict=True):
        check(items, capacity, solution)
        assert solution.loss == pytest.approx(by_milp(items, capacity), rel=1e-7)


def test_a_frontier_of_nothing_is_empty_and_one_below_the_cheapest_is_refused() -> None:
    assert frontier(model_items(layers=1), []) == []
    with pytest.raises(InfeasibleBudget, match="more than the capacity of 9"):
        frontier([[(4, 2.0)], [(6, 0.0), (9, 0.0)]], [20, 9])


@settings(max_examples=200, deadline=None)
@given(items=small_items, limit=st.integers(0, 60).map(float))
def test_the_least_capacity_is_that_of_the_cheapest_selection_that_serves(items: Items, limit: float) -> None:
    costs = [sum(c for c, _ in s) for s in itertools.product(*items) if sum(loss for _, loss in s) <= limit]
    dearest = sum(max(cost for cost, _ in item) for item in items)
    found = Knapsack(items, dearest).least_capacity(lambda solution: solution.loss <= limit)
    if not costs:
        assert found is None
        return
    assert found is not None
    solution, proven = found
    assert (solution.cost, proven) == (min(costs), True)
    assert solution.loss <= limit
