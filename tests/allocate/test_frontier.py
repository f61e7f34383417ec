"""The frontier against `allocate` at each of its budgets."""

from __future__ import annotations

import math
from typing import Any

import pytest
from handmade import full, geometry, scored, scores
from requested import allocate, frontier
from score_factories import random_scores

from kvprof.allocate.frontier import KNEES, knees
from kvprof.errors import InfeasibleBudget, UsageError
from kvprof.records.frontier import Frontier


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit": "nominal"},
        {"tie": "key-value", "pins": ["key:0=4", "value:0=rot4"]},
        {"bits": (2, 3, 16), "min_key_bits": 3},
        {"formats": "rot2,rot3,key:int2g64c", "group_size": 64},
    ],
)
def test_every_point_is_the_plan_that_allocate_makes(options: dict[str, Any]) -> None:
    source = random_scores(5, factor=1.6)
    found = frontier(source, points=23, **options)
    for point in found.points[::3]:
        plan = allocate(source, budget=point.budget, **options)
        assert plan.recipe == point.plan_digest
        assert (plan.budget.nominal_bits, plan.budget.stored_bits) == (point.nominal_bits, point.stored_bits)
        assert plan.budget.bytes_per_token == point.bytes_per_token
        assert plan.solver.predicted_kl_nats == point.predicted_kl_nats
        assert plan.solver.predicted_kl_stderr_nats == point.predicted_kl_stderr_nats
        assert point.compression == 16 / plan.budget.stored_bits
        assert point.optimal


def test_more_bits_never_lose_more() -> None:
    points = frontier(random_scores(8)).points
    losses = [point.predicted_kl_nats for point in points]
    assert losses == sorted(losses, reverse=True)
    assert [point.budget for point in points] == sorted({point.budget for point in points})


def test_budgets_are_round_numbers_between_the_cheapest_and_the_dearest_plan() -> None:
    budgets = [point.budget for point in frontier(random_scores(4)).points]
    assert (budgets[0], budgets[-1]) == (1.75, 7.5)
    assert 100 <= len(budgets) <= 202
    assert all(round(budget * 20) / 20 == budget for budget in budgets)
    fine = [point.budget for point in frontier(random_scores(4), low="2.501", high="2.55").points]
    assert fine == [2.501, 2.51, 2.52, 2.53, 2.54, 2.55]


def test_points_are_evenly_spaced_from_end_to_end() -> None:
    budgets = [point.budget for point in frontier(random_scores(4), low=2, high=4, points=5).points]
    assert budgets == [2, 2.5, 3, 3.5, 4]
    assert len(frontier(random_scores(4), low=3, high=3).points) == 1
    assert len(frontier(random_scores(4), points=200).points) == 200


def test_a_single_plan_has_a_frontier_of_one_point_whatever_it_costs() -> None:
    shape = geometry(full(0, 1), full(1, 6))  # a fourteenth of the cache in full precision
    table = {"int2g64": 0.1}
    (point,) = frontier(scored((table, table), (table, table), geometry=shape), pins=["key:0=full"]).points
    assert point.budget == point.stored_bits
    assert round(point.budget, 4) != point.budget


def test_bytes_are_those_of_the_plan_at_the_context_and_batch() -> None:
    source = random_scores(4)
    found = frontier(source, low=2, high=4, points=5, context=1000, batch=3)
    for point in found.points:
        assert point.bytes == allocate(source, budget=point.budget).bytes_at(1000, 3)
    assert (found.context, found.batch) == (1000, 3)
    assert frontier(source, low=2, high=4, points=5).points[0].bytes is None


def test_it_says_what_it_was_made_from_and_reads_back() -> None:
    source = random_scores(3, factor=1.6)
    found = frontier(source, points=9, command="kvprof frontier --points 9")
    assert (found.scores, found.metric, found.unit) == (source.digest, "loss_increase", "stored")
    assert (found.model, found.kl_calibration) == (source.model, source.kl_calibration)
    assert found.command == "kvprof frontier --points 9"
    assert Frontier.from_json(found.model_dump(mode="json", by_alias=True), "frontier") == found


def test_the_knees_are_marked() -> None:
    found = frontier(random_scores(10))
    assert 1 <= len(found.knees) <= 3
    assert all(found.points[0].budget < knee.budget < found.points[-1].budget for knee in found.knees)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"low": 1}, InfeasibleBudget, r"cheapest plan: 1\.75 (.|\n)*try --from 1\.75"),
        ({"high": 99}, InfeasibleBudget, r"try --to 7\.5"),
        ({"low": 4, "high": 3}, UsageError, "--from 4 is more than --to 3"),
        ({"low": "low"}, UsageError, "is not a number of bits"),
        ({"points": 1}, UsageError, "--points 1: at least 2"),
        ({"points": 1001}, UsageError, "--points 1001: at most 1000"),
        ({"unit": "bytes"}, UsageError, "unknown --unit 'bytes'"),
        ({"batch": 2}, UsageError, "Add --context"),
        ({"context": 0}, UsageError, "--context 0: at least 1"),
        ({"formats": "int5g64"}, UsageError, "was not scored"),
    ],
)
def test_a_frontier_that_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        frontier(random_scores(3), **options)


def test_a_norm_has_no_frontier_and_bytes_need_a_geometry() -> None:
    with pytest.raises(UsageError, match="a norm predicts no KL divergence"):
        frontier(scores([1.0], [1.0]))
    table = {"int2g64": 0.1, "int4g64": 0.01}
    assert len(frontier(scored((table, table))).points) > 100
    with pytest.raises(UsageError, match="carry no geometry"):
        frontier(scored((table, table)), context=100)


# Knees of curves whose bends are known


def curve(*slopes: tuple[float, float]) -> list[tuple[float, float]]:
    """Points every tenth of a bit; (bits, nats of logarithm saved a bit) stretches, one after the other."""
    bits, log, points = 1.0, 0.0, [(1.0, 1.0)]
    for length, slope in slopes:
        for _ in range(round(length * 10)):
            bits, log = bits + 0.1, log - slope / 10
            points.append((bits, math.exp(log)))
    return points


def test_a_single_bend_is_the_knee() -> None:
    assert knees(curve((1, 4), (3, 1))) == [10]


def test_several_bends_are_found_the_greatest_first() -> None:
    assert knees(curve((1, 6), (1, 3), (2, 1))) == [10, 20]
    bends = knees(curve((1, 32), (1, 16), (1, 8), (1, 4), (1, 2), (1, 1)))
    assert len(bends) == KNEES
    assert set(bends) <= {10, 20, 30, 40, 50}


@pytest.mark.parametrize("slopes", [((3, 2),), ((1, 1), (2, 4)), ((1, 2), (1, 1.9))])
def test_a_line_or_a_curve_that_falls_ever_faster_has_none(slopes: tuple[tuple[float, float], ...]) -> None:
    assert knees(curve(*slopes)) == []


def test_the_grid_of_budgets_moves_no_knee() -> None:
    points = curve((1, 4), (3, 1))
    sparse = points[::5]
    assert sparse[knees(sparse)[0]] == points[knees(points)[0]] == points[10]


def test_plans_without_loss_and_budgets_with_the_same_plan_do_not_count() -> None:
    points = [point for point in curve((1, 4), (3, 1)) for _ in range(2)]
    assert knees([*points, (6.0, 0.0)]) == [20]


@pytest.mark.parametrize("points", [[], [(1.0, 0.5)], [(1.0, 0.5), (2.0, 0.1)], [(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)]])
def test_less_than_three_points_have_no_knee(points: list[tuple[float, float]]) -> None:
    assert knees(points) == []
