"""A request is written once: command, function and recipe's table ask for the same things by the same names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from score_factories import random_scores

import kvprof
from kvprof import BitPlan
from kvprof.api import plan as api
from kvprof.cli import allocate as cli
from kvprof.errors import UsageError
from kvprof.records.recipe import Plans
from kvprof.records.recipe import Target as TargetTable
from kvprof.records.requests.plan import AllocateRequest

FIELDS = set(AllocateRequest.model_fields)
WHERE_IT_GOES = {"out"}


def test_the_command_has_an_option_for_each_field_and_no_other() -> None:
    assert set(inspect.signature(cli.allocate).parameters) - WHERE_IT_GOES == FIELDS


def test_the_function_has_a_keyword_for_each_field_and_no_other() -> None:
    assert set(inspect.signature(api.allocate).parameters) - WHERE_IT_GOES == FIELDS


def test_a_recipe_has_a_key_for_each_field_and_no_other() -> None:
    """A table makes a plan of each of its budgets; a plan for a runtime is a table of its own."""
    plans = {"budget" if name == "budgets" else name for name in Plans.model_fields}
    assert plans - {"name"} == FIELDS - {"target"}
    assert {"budget" if name == "budgets" else name for name in TargetTable.model_fields} - {"runtime"} <= FIELDS


def test_what_was_not_asked_for_is_not_written() -> None:
    request = AllocateRequest(budget="2.50", pin=("key:0=8",), sink_tokens=0)
    assert request.model_dump(mode="json") == {"budget": "2.50", "pin": ["key:0=8"], "sink_tokens": 0}
    assert AllocateRequest.model_validate(request.model_dump(mode="json")) == request
    with pytest.raises(ValidationError, match="evil"):
        AllocateRequest.model_validate({"evil": 1})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("budget", value) for value in ([1], True, float("nan"), float("inf"), 10**400, "\ud800", {}, b"3")),
        *(("memory", value) for value in (1.5, True, [1], b"1GiB")),
        *(("context", value) for value in (1.5, "x", True, 10**400, 2**63)),
        *(("bits", value) for value in (1.5, "x", True, [2, 7], [], object())),
        *(("pin", value) for value in (7, "x", [7], "\ud800")),
        *(("max_kl", value) for value in ([0.1], True, float("nan"))),
        *(("bits_key", value) for value in (1.5, True, "4", 2**63)),
        *(("sink_tokens", value) for value in (-1, 1.5, True, 2**63)),
    ],
)
def test_a_value_that_no_option_takes_is_refused(option: str, value: Any) -> None:
    others: dict[str, Any] = {
        "bits_key": {"rule": "uniform", "bits_value": 4},
        "memory": {"context": 64},
        "context": {"memory": "1MiB"},
        "max_kl": {},
    }
    with pytest.raises(UsageError):
        api.allocate(random_scores(2, 2), **others.get(option, {"budget": 6.0}) | {option: value})


def test_a_command_that_no_file_could_hold_is_left_out(in_tmp: Path) -> None:
    pins = [f"key:{number % 3}=int4g64" for number in range(9_000)]
    plan = kvprof.allocate(random_scores(3), 6, pin=pins, out="plan.json")
    assert plan.provenance is not None
    assert plan.provenance.command is None
    assert BitPlan.load("plan.json") == plan
