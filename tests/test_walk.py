"""The table of types on the page of models, and a sample of the walk that it was made from.

The whole walk takes a quarter of an hour: `python tests/walk.py --measure --write`. Here are one type of each kind that
is seldom, and every forty-fifth of all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import transformers
from coverage_table import PAGE, section
from packaging.version import Version
from pages import README
from shrunk import types
from walk import MARKERS, OUTCOMES, WALKED, walk

WALKED_TYPES: dict[str, dict[str, Any]] = json.loads(WALKED.read_text(encoding="utf-8"))
SELDOM = ("mllama", "voxtral", "inkling2_text", "cosmos3_edge", "minimax", "hrm_text", "openai-gpt", "kosmos-2")
IS_THE_WALKED = Version(transformers.__version__).release[:2] == (5, 23)

pytestmark = pytest.mark.skipif(not IS_THE_WALKED, reason="walked with transformers 5.23; others have other types")


@pytest.mark.parametrize("kind", sorted({*SELDOM, *sorted(WALKED_TYPES)[::45]}))
def test_a_type_comes_to_what_the_table_says(kind: str) -> None:
    assert walk(kind)["outcome"] == WALKED_TYPES[kind]["outcome"]


def test_every_type_that_transformers_has_was_walked() -> None:
    assert sorted(WALKED_TYPES) == types()
    assert {found["outcome"] for found in WALKED_TYPES.values()} <= OUTCOMES.keys()


def test_the_table_of_types_is_what_the_command_prints() -> None:
    command = [sys.executable, str(WALKED.parents[1] / "walk.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = PAGE.read_text(encoding="utf-8")
    assert section(page, printed.strip(), MARKERS) == page


def test_the_first_page_counts_the_types_of_the_whole_chain() -> None:
    whole = sum(found["outcome"] == "whole" for found in WALKED_TYPES.values())
    assert f"{whole} of the {len(WALKED_TYPES)} causal," in README.read_text(encoding="utf-8")
