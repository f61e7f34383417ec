"""Knees of curves whose bends are known."""

from __future__ import annotations

import math

import pytest

from kvprof.allocate.knees import KNEES, knees


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
