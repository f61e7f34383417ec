"""Every family of models through the whole chain of commands, and the table of what came of it.

Of the chain, 16 bits must generate what a DynamicCache does, and a plan's cache must have the plan's bytes.
tests/data/coverage.json says what else was seen when the table was made: a difference is a change of what kvprof
supports, and asks for `python tests/coverage_table.py --measure --write`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from coverage_table import MARKERS, PAGE, SEEN, section
from families import FAMILIES, see
from tiny import APART, TINY, UNUSUAL

COVERAGE: dict[str, Any] = json.loads(SEEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_does_what_the_table_says(name: str) -> None:
    seen = see(name)
    if seen["cache"] is not None:
        assert all(seen["cache"].values()), seen["cache"]
    assert json.loads(json.dumps(seen)) | {"family": FAMILIES[name]} == COVERAGE[name]


def test_every_tiny_model_is_in_the_table() -> None:
    assert set(FAMILIES) == set(TINY) | set(UNUSUAL) | set(APART)
    assert list(COVERAGE) == list(FAMILIES)


def test_what_is_not_supported_is_what_is_known_not_to_be() -> None:
    without = {
        column: [name for name in FAMILIES if not isinstance(COVERAGE[name][column], list)]
        for column in ("norms", "gradient_norm", "loss_increase", "plan")
    }
    assert without == {"norms": [], "gradient_norm": [], "loss_increase": ["xglm"], "plan": []}
    slow = [name for name in FAMILIES if (COVERAGE[name]["evaluate"] or {}).get("path") == "exact"]
    assert slow == ["xglm"]


def test_the_table_of_the_page_is_what_the_command_prints() -> None:
    command = [sys.executable, str(SEEN.parents[1] / "coverage_table.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = PAGE.read_text(encoding="utf-8")
    assert section(page, printed.strip(), MARKERS) == page
