"""A frontier's table: few rows, the knees among them, and commands that can be typed."""

from __future__ import annotations

import pytest
from requested import frontier
from score_factories import random_scores

from kvprof.records.frontier import Frontier
from kvprof.report.frontiers import allocate_command, knee_lines, show_frontier


def command_of(made_by: str) -> str:
    found = frontier(random_scores(2), low=2, high=4, points=5, command=made_by)
    return allocate_command(found, found.points[1])


@pytest.mark.parametrize(
    ("made_by", "wanted"),
    [
        ("kvprof frontier", "kvprof allocate --budget 2.5"),
        (
            "kvprof frontier --scores a.json --tie key-value",
            "kvprof allocate --budget 2.5 --scores a.json --tie key-value",
        ),
        ("kvprof frontier --from 2 --to=4 --points 5 --pin key:0=8", "kvprof allocate --budget 2.5 --pin key:0=8"),
        (
            "kvprof frontier --context 9 --batch=2 --out there --unit nominal",
            "kvprof allocate --budget 2.5 --unit nominal",
        ),
    ],
)
def test_the_command_for_a_point_has_the_options_that_allocate_shares(made_by: str, wanted: str) -> None:
    assert command_of(made_by) == wanted


def rows(found: Frontier, capsys: pytest.CaptureFixture[str]) -> list[str]:
    show_frontier(found)
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith(" ") and line.strip()[:1].isdigit() and "kvprof" not in line]


def test_a_long_frontier_is_shown_at_round_budgets_its_ends_and_its_knees(capsys: pytest.CaptureFixture[str]) -> None:
    found = frontier(random_scores(6))
    shown = rows(found, capsys)
    assert 8 <= len(shown) <= 30
    budgets = [float(row.split()[0]) for row in shown]
    assert {1.75, 2.0, 2.5, 3.0, 7.5} <= set(budgets)
    assert {knee.budget for knee in found.knees} <= set(budgets)
    assert max(map(len, shown)) <= 80


def test_budgets_that_are_not_round_are_shown_evenly(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(rows(frontier(random_scores(6), points=100, context=32768, batch=4), capsys)) >= 20


def test_the_knees_come_with_their_commands() -> None:
    found = frontier(random_scores(6), command="kvprof frontier")
    lines = knee_lines(found)
    assert len(lines) == 1 + len(found.knees)
    assert f"kvprof allocate --budget {found.knees[0].budget:g}" in lines[1]
    assert knee_lines(frontier(random_scores(6), formats="rot2")) == []
    assert "no knee" in knee_lines(frontier(random_scores(6), low="3", high="3.5"))[0]
