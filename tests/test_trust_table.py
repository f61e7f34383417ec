"""Is the table of trust on the page of models what was tried? And would it say so if something had failed?"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trust_table
from coverage_table import PAGE, section
from reliability import Trial
from trust_table import MARKERS, PARTS, load, measure, table

ROOT = Path(__file__).parents[1]


def test_the_table_of_the_page_is_what_the_command_prints() -> None:
    done = subprocess.run([sys.executable, trust_table.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0  # nothing failed
    page = PAGE.read_text(encoding="utf-8")
    assert section(page, done.stdout.strip(), MARKERS) == page


@pytest.mark.parametrize("part", PARTS)
def test_a_part_was_tried_as_its_command_says(part: str) -> None:
    trials, words = load()[part], PARTS[part][1].split()
    assert (ROOT / next(word for word in words if word.startswith("tests/"))).is_file()
    for option in ("--inputs", "--lives"):
        if option in words:
            assert {str(trial.times) for trial in trials} == {words[words.index(option) + 1]}
    if "--seed" in words:
        assert {str(trial.seed) for trial in trials} == {words[-1]}
    assert all(trial.times > 0 and trial.failed == 0 for trial in trials)


def test_what_failed_is_in_the_table() -> None:
    well = Trial("scores", 1_000, 0, 3, 2.0)
    (row,) = table({"fuzz": [well, replace(well, what="plan", times=999, failed=2)]}).splitlines()[2:]
    assert [cell.strip() for cell in row.split("|")][2:6] == ["999 to 1,000 each", "2", "3", "scores, plan"]


def test_a_file_of_tests_is_counted_by_its_cases() -> None:
    (again,), (kept,) = measure("gguf"), load()["gguf"]
    assert (again.times, again.failed) == (kept.times, kept.failed)
