"""The quadratic knapsack against brute force over all selections, and what plans make of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from requested import frontier
from score_factories import random_effects, random_scores, scores_of_effects

from kvprof.allocate.budget import bit_limit
from kvprof.allocate.exchange import QuadraticKnapsack
from kvprof.allocate.methods import exact
from kvprof.allocate.problem import ExactProblem
from kvprof.allocate.solver import solve
from kvprof.records.scores import LOSS_INCREASE

Floats = NDArray[np.float64]
Items = list[list[tuple[int, float]]]
ROUNDING = 1e-9
NAMES = {"key": ("int2g64", "int3g64", "int4g64", "rot2", "rot3"), "value": ("rot1", "rot2", "rot3", "int2g64")}


def instance(seed: int, items: int, choices: int, sharing: float) -> tuple[Items, Floats]:
    """More costly choices lose less; different items share as much of their roots as a share says, or less."""
    draw = np.random.default_rng(seed)
    rows: Items = []
    for _ in range(items):
        number = int(draw.integers(1, choices + 1))
        costs = draw.integers(1, 12, number)
        rows.append([(int(cost), float(np.exp(-0.4 * cost + 0.7 * draw.standard_normal()))) for cost in costs])
    losses = np.array([loss for row in rows for _, loss in row])
    owners = np.repeat(np.arange(items), list(map(len, rows)))
    shares = sharing * draw.random((len(losses), len(losses)))
    shares = np.minimum(shares, shares.T)
    pairs = np.where(owners[:, None] != owners, shares * np.sqrt(np.outer(losses, losses)), 0.0)
    np.fill_diagonal(pairs, losses)
    return rows, pairs


def by_brute_force(rows: Items, pairs: Floats, capacity: int) -> float:
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    return min(
        float(pairs[np.ix_(starts + choices, starts + choices)].sum())
        for choices in map(np.array, itertools.product(*(range(len(row)) for row in rows)))
        if sum(row[choice][0] for row, choice in zip(rows, choices, strict=True)) <= capacity
    )


instances = st.builds(
    instance,
    seed=st.integers(0, 2**32 - 1),
    items=st.integers(1, 5),
    choices=st.integers(1, 4),
    sharing=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)


@settings(max_examples=200, deadline=None)
@given(drawn=instances, room=st.floats(0, 1))
def test_exchange_stays_within_the_capacity_and_between_its_start_and_the_truth(
    drawn: tuple[Items, Floats], room: float
) -> None:
    rows, pairs = drawn
    low, high = (sum(chosen(cost for cost, _ in row) for row in rows) for chosen in (min, max))
    capacity = low + int(room * (high - low))
    quadratic = QuadraticKnapsack(rows, pairs)
    start = solve(rows, capacity)
    found, truth = quadratic.improve(start, [], capacity), by_brute_force(rows, pairs, capacity)
    assert found.cost == sum(row[choice][0] for row, choice in zip(rows, found.choices, strict=True)) <= capacity
    assert found.loss == pytest.approx(quadratic.loss(found.choices))
    assert truth * (1 - ROUNDING) <= found.loss <= quadratic.loss(start.choices) * (1 + ROUNDING)
    assert found.lower_bound <= truth * (1 + ROUNDING)


def test_exchange_finds_the_best_of_most_small_problems() -> None:
    """Of 300 problems of five items that share up to half of their roots; the rest is near."""
    ratios = []
    for seed in range(300):
        rows, pairs = instance(seed, 5, 4, 0.5)
        low, high = (sum(chosen(cost for cost, _ in row) for row in rows) for chosen in (min, max))
        capacity = (low + high) // 2
        found = QuadraticKnapsack(rows, pairs).improve(solve(rows, capacity), [], capacity)
        ratios.append(found.loss / by_brute_force(rows, pairs, capacity))
    exactly = sum(ratio < 1 + ROUNDING for ratio in ratios)
    assert exactly > 270
    assert max(ratios) < 1.15


def test_where_nothing_is_shared_the_best_of_the_losses_is_proven() -> None:
    for seed in range(30):
        rows, pairs = instance(seed, 6, 4, 0.0)
        capacity = sum(max(cost for cost, _ in row) for row in rows) * 2 // 3
        capacity = max(capacity, sum(min(cost for cost, _ in row) for row in rows))
        start = solve(rows, capacity)
        found = QuadraticKnapsack(rows, pairs).improve(start, [], capacity)
        assert found.choices == start.choices
        assert found.optimal


def test_another_start_that_loses_less_is_taken_up() -> None:
    """Two dear choices share all they lose: by losses alone they are the best, a selection of others is better."""
    rows = [[(1, 1.0), (1, 1.6)], [(1, 1.0), (1, 1.6)]]
    pairs = np.diag([1.0, 1.6, 1.0, 1.6])
    pairs[0, 2] = pairs[2, 0] = 1.0
    quadratic = QuadraticKnapsack(rows, pairs)
    start = solve(rows, 2)
    assert start.choices == (0, 0)
    assert quadratic.improve(start, [], 2).loss == pytest.approx(4.0)  # 1.6 is too far above 1.0 to be tried
    assert quadratic.improve(start, [(1, 0), (1, 1)], 2).loss == pytest.approx(2.6)


def test_two_items_change_at_once_where_one_pays_for_the_other() -> None:
    rows = [[(1, 1.0), (2, 0.9)], [(1, 1.0), (2, 0.9)], [(0, 0.5)]]
    pairs = np.diag([1.0, 0.9, 1.0, 0.9, 0.5])
    pairs[1, 4] = pairs[4, 1] = 0.3  # the first item's dear choice and the third item's only one share something
    quadratic = QuadraticKnapsack(rows, pairs)
    start = solve(rows, 3)
    found = quadratic.improve(start, [], 3)
    assert (start.choices, found.choices) == ((1, 0, 0), (0, 1, 0))
    assert found.loss == pytest.approx(0.9 + 1.0 + 0.5)


OPTIONS: list[dict[str, Any]] = [{}, {"tie": "key-value"}, {"pins": ["key:0=rot3"]}, {"formats": "rot2,rot3,int2g64"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", ["2.25", "2.6", "3.1"])
def test_a_plan_s_objective_is_no_more_than_of_the_sums_alone_or_of_any_pair_that_fits(
    budget: str, options: dict[str, Any]
) -> None:
    scores = scores_of_effects(random_effects(4, 8, 48, seed=2, names=NAMES, common=0.9))
    allowed = {name: value for name, value in options.items() if name != "tie"}
    problem = ExactProblem(scores, bit_limit(budget, "stored"), LOSS_INCREASE, allowed, options.get("tie"))
    capacity = problem.capacity(problem.limit)
    separable = problem.solver(solve(problem.items, capacity), optimal=False).objective
    plan = exact(scores, bit_limit(budget, "stored"), **options)
    assert plan.budget.stored_bits <= float(budget)
    assert plan.solver.objective <= separable * (1 + ROUNDING)
    for _, choices in problem._uniform:
        if problem._cost(choices) <= capacity:
            assert plan.solver.objective <= problem._quadratic.loss(choices) * (1 + ROUNDING)
    assert (plan.solver.lower_bound is None) == plan.solver.optimal
    if plan.solver.lower_bound is not None:
        assert plan.solver.lower_bound <= plan.solver.objective


def test_tied_tensors_have_equally_wide_codes_after_an_exchange_too() -> None:
    scores = scores_of_effects(random_effects(4, 8, 48, seed=3, names=NAMES, common=0.9))
    for budget in ("2.4", "2.9"):
        plan = exact(scores, bit_limit(budget, "stored"), tie="key-value")
        assert all(entry.key.bits == entry.value.bits for entry in plan.layers)
        assert plan.budget.stored_bits <= float(budget)


def test_the_objective_of_tied_tensors_is_that_of_the_same_formats_untied() -> None:
    scores = scores_of_effects(random_effects(3, 8, 48, seed=4, names=NAMES, common=0.9))
    plan = exact(scores, bit_limit("2.6", "stored"), tie="key-value")
    untied = ExactProblem(scores, bit_limit("2.6", "stored"), LOSS_INCREASE, {})
    parts = [
        next(choice for choice in choices if choice.format.name == plan.layers[tensor.layer].tensor(tensor.name).name)
        for tensor, choices in zip(untied.task.tensors, untied.candidates, strict=True)
    ]
    assert plan.solver.objective == pytest.approx(untied.task.objective(parts))


@pytest.mark.parametrize("common", [0.0, 0.9])
def test_small_plans_are_mostly_the_best_by_brute_force(common: float) -> None:
    names = {"key": ("int2g64", "int3g64", "int4g64"), "value": ("rot2", "rot3", "int2g64")}
    misses = 0
    for seed in range(8):
        scores = scores_of_effects(random_effects(2, 6, 32, seed=seed, names=names, common=common))
        problem = ExactProblem(scores, bit_limit("2.9", "stored"), LOSS_INCREASE, {})
        capacity = problem.capacity(problem.limit)
        plan = problem.plan(problem.best(capacity), problem.limit)
        truth = by_brute_force(problem.items, problem._quadratic._pairs, capacity)
        assert plan.solver.objective >= truth * (1 - ROUNDING)
        assert (plan.solver.lower_bound or 0.0) <= truth * (1 + ROUNDING)
        misses += plan.solver.objective > truth * (1 + ROUNDING)
    assert misses <= 1


def test_scores_without_effects_are_added_up_as_before() -> None:
    scores = random_scores(5, factor=1.5)
    for budget in ("2.3", "3"):
        plan = exact(scores, bit_limit(budget, "stored"))
        entries = [(layer, tensor, layer.tensor(tensor).name) for layer in plan.layers for tensor in ("key", "value")]
        losses = [scores.entry(layer.layer).tensor(tensor).loss_increase[name] for layer, tensor, name in entries]
        assert plan.solver.optimal
        assert plan.solver.objective == pytest.approx(sum(losses), rel=1e-12)
        assert plan.solver.predicted_kl_nats == pytest.approx(1.5 * sum(losses), rel=1e-12)
        assert (plan.solver.selection_nats, plan.solver.lower_bound) == (None, None)
        assert plan.solver.kl_factor == 1.5


def test_a_file_of_an_older_kvprof_that_has_no_effects_makes_the_plans_that_it_made() -> None:
    """Its losses and samples are all that counts: those of these effects, the effects taken away."""
    scores = scores_of_effects(random_effects(4, 8, 48, seed=5, names=NAMES, common=0.9))
    value = scores.model_dump(mode="json", by_alias=True, exclude={"effects"})
    for entry in value["layers"]:
        for tensor in ("key", "value"):
            del entry[tensor]["loss_effects"]
    old = type(scores).from_json(value, "old")
    plan = exact(old, bit_limit("2.4", "stored"))
    problem = ExactProblem(old, bit_limit("2.4", "stored"), LOSS_INCREASE, {})
    solution = solve(problem.items, problem.capacity(problem.limit))
    assert problem.adds_up
    assert [part.format.name for part in problem.chosen(solution)] == [
        layer.tensor(tensor).name for tensor in ("key", "value") for layer in plan.layers
    ]
    assert plan.solver.objective == pytest.approx(solution.loss, rel=1e-12)
    assert plan.solver.optimal


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_point_of_a_frontier_is_the_plan_that_exact_makes(options: dict[str, Any]) -> None:
    scores = scores_of_effects(random_effects(4, 8, 48, seed=6, names=NAMES, common=0.9), factor=1.3)
    for point in frontier(scores, points=7, **options).points:
        plan = exact(scores, bit_limit(str(point.budget), "stored"), **options)
        assert plan.recipe == point.plan_digest
        assert plan.solver.predicted_kl_nats == point.predicted_kl_nats
        assert plan.solver.predicted_kl_stderr_nats == point.predicted_kl_stderr_nats
        assert plan.solver.optimal == point.optimal
        assert plan.budget.stored_bits == point.stored_bits
