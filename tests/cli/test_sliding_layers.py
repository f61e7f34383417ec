"""Layers of a sliding window, from scores to a plan that is verified: which are planned, which left alone, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folders import save_folder, save_text
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores

TEXT = ("--data", "text.txt", "--sequence-length", "48", "--sequences", "3", "--pack")
WINDOW = ("--sink-tokens", "1", "--recent-tokens", "4")
LEFT = "sliding window of 16 tokens"
HELD = f"{LEFT}, no more than stay in full precision"


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def said(result: Result) -> str:
    return " ".join(result.output.split())


def scored(folder: Path, name: str, *words: str) -> Result:
    save_folder(folder / "model", name)
    save_text(folder / "text.txt")
    return run("gradients", "model", *TEXT, *words, "--out", "out")


def plan_of(*words: str) -> dict[str, Any]:
    """Return the plan that allocate writes, once verify has found it to be what its scores and model give."""
    result = run("allocate", "--scores", "out/gradients.json", *words, "--out", "plan.json")
    assert result.exit_code == 0, result.output
    checked = run("verify", "plan.json", "--scores", "out/gradients.json", "--model", "model")
    assert checked.exit_code == 0, checked.output
    found: dict[str, Any] = json.loads(Path("plan.json").read_text())
    assert found["provenance"]["scores"] == Scores.load("out/gradients.json").digest
    return found


def planned(plan: dict[str, Any]) -> list[int]:
    return [entry["layer"] for entry in plan["layers"]]


def test_a_model_of_sliding_layers_alone_gets_a_plan(in_tmp: Path) -> None:
    assert scored(in_tmp, "mistral-sliding", *WINDOW).exit_code == 0
    plan = plan_of("--budget", "4")
    assert planned(plan) == [0, 1]
    assert not plan["skipped"]
    assert all(plan["layers"][layer][name]["bits"] < 16 for layer in range(2) for name in ("key", "value"))
    # However long the text: a window of 16 tokens, keys and values of 2 heads of 8 in float32.
    read = BitPlan.load("plan.json")
    assert 0 < read.bytes_at(16_000) < 2 * 16 * 2 * 16 * 4


def test_full_layers_of_a_model_that_has_none_are_no_plan(in_tmp: Path) -> None:
    result = scored(in_tmp, "mistral-sliding", *WINDOW, "--layers", "full")
    assert result.exit_code == 0
    assert f"no loss is predicted: no plan gives bits to any layer ({LEFT})" in said(result)
    result = run("allocate", "--scores", "out/gradients.json", "--budget", "4")
    assert result.exit_code == 1
    assert f"nothing to give bits to. {LEFT}" in said(result)


def test_allocate_leaves_scored_layers_alone_where_it_is_told_so(in_tmp: Path) -> None:
    assert scored(in_tmp, "gemma3", *WINDOW).exit_code == 0
    assert planned(plan_of("--budget", "4")) == planned(plan_of("--budget", "4", "--layers", "all")) == [0, 1]
    plan = plan_of("--budget", "4", "--layers", "full")
    assert planned(plan) == [1]
    assert plan["skipped"] == [{"layer": 0, "reason": LEFT}]
    result = run("allocate", "--scores", "out/gradients.json", "--budget", "4", "--layers", "some")
    assert result.exit_code == 2
    assert "--layers 'some'" in said(result)


def test_a_window_within_the_recent_tokens_is_left_alone(in_tmp: Path) -> None:
    assert scored(in_tmp, "gemma3", *WINDOW).exit_code == 0
    for recent, layers in (("15", [0, 1]), ("16", [1])):
        plan = plan_of("--budget", "4", "--recent-tokens", recent)
        assert planned(plan) == layers
        assert plan["skipped"] == ([] if layers == [0, 1] else [{"layer": 0, "reason": HELD}])


def test_scores_with_a_longer_window_than_the_layers_say_so(in_tmp: Path) -> None:
    result = scored(in_tmp, "mistral-sliding", "--recent-tokens", "20")
    assert result.exit_code == 0
    assert f"no plan gives bits to any layer ({HELD})" in said(result)


@pytest.mark.parametrize(
    ("context", "memory", "layers"), [(5, 1280, [1]), (6, 1320, [0, 1]), (16, 1700, [0, 1]), (64, 3000, [0, 1])]
)
def test_bytes_of_a_context_decide_by_that_context(in_tmp: Path, context: int, memory: int, layers: list[int]) -> None:
    """Of 5 tokens 1 is a sink and 4 are recent, in 256 bytes each: nothing would be quantized."""
    assert scored(in_tmp, "gemma3", *WINDOW).exit_code == 0
    plan = plan_of("--memory", f"{memory}B", "--context", str(context))
    assert planned(plan) == layers
    assert BitPlan.load("plan.json").bytes_at(context) <= memory


def test_a_plan_that_leaves_layers_is_explained_and_not_compared_with_one_that_covers_them(in_tmp: Path) -> None:
    assert scored(in_tmp, "gemma3", *WINDOW).exit_code == 0
    plan_of("--budget", "4", "--layers", "full")
    Path("plan.json").rename("full.json")
    plan_of("--budget", "4")
    result = run("diff", "plan.json", "full.json")
    assert result.exit_code == 4
    assert "plan.json gives bits to layer 0, which slides; full.json leaves it alone" in said(result)
    for layer, words in (("1", "layer 1"), ("0", LEFT)):
        result = run("explain", "full.json", "--layer", layer, "--scores", "out/gradients.json")
        assert words in said(result), result.output
    for name in ("full.json", "plan.json"):
        result = run("validate", name, "model")
        assert result.exit_code == 0, result.output


def test_evaluating_a_plan_of_sliding_layers_token_by_token_gives_the_same(in_tmp: Path) -> None:
    assert scored(in_tmp, "mistral-sliding", *WINDOW).exit_code == 0
    plan_of("--budget", "4")
    found = {}
    for words in ((), ("--exact",)):
        result = run("evaluate", "plan.json", "--model", "model", *TEXT, "--no-rivals", *words, "--out", "evaluated")
        assert result.exit_code == 0, result.output
        evaluation = json.loads(Path("evaluated/evaluation.json").read_text())
        found[evaluation["path"]] = evaluation["plans"][0]["kl_nats"]
    assert len(found) == 2
    fast, exact = found.values()
    assert fast == pytest.approx(exact, rel=1e-3)
    assert exact > 1e-3


def test_a_frontier_covers_the_layers_that_allocate_covers(in_tmp: Path) -> None:
    assert scored(in_tmp, "gemma3", *WINDOW).exit_code == 0
    losses = {}
    for choice in ("all", "full"):
        words = ("--scores", "out/gradients.json", "--layers", choice)
        result = run("frontier", *words, "--from", "4", "--to", "5", "--points", "2", "--out", "frontier.json")
        assert result.exit_code == 0, result.output
        losses[choice] = json.loads(Path("frontier.json").read_text())["points"][0]["predicted_kl_nats"]
        plan = plan_of("--budget", "4", "--layers", choice)
        assert losses[choice] == pytest.approx(plan["solver"]["predicted_kl_nats"])
    assert losses["full"] != losses["all"]
    result = run("frontier", "--scores", "out/gradients.json", "--layers", "ful")
    assert result.exit_code == 2
    assert "--layers 'ful': did you mean 'full'?" in said(result)


def test_a_frontier_of_no_layers_says_why(in_tmp: Path) -> None:
    assert scored(in_tmp, "mistral-sliding", *WINDOW).exit_code == 0
    result = run("frontier", "--scores", "out/gradients.json", "--layers", "full")
    assert result.exit_code == 2
    assert f"a plan would leave every layer of this model alone: {LEFT}." in said(result)
    assert "Leave out --layers full." in said(result)
