"""Which scores are taken where none are named, and what plans are called."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvprof import BitPlan
from kvprof.errors import InvalidFile, UsageError
from kvprof.workspace.discovery import newest_scores
from kvprof.workspace.names import plan_name

LOSSES = {"loss_increase": {"int2g64": 0.1}}


def put(path: Path, age: int, fingerprint: str | None = "sha256:1", **tensor: Any) -> Path:
    """Write scores of one layer, so many seconds old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [{"layer": 0, "key": tensor, "value": tensor}]
    model = {"id": "mine", "fingerprint": fingerprint, "num_layers": 1}
    path.write_text(json.dumps({"schema": "kvprof.scores/1", "model": model, "layers": layers}))
    os.utime(path, (10**9 - age, 10**9 - age))
    return path


def test_losses_are_taken_before_newer_norms_of_the_same_model(tmp_path: Path) -> None:
    losses = put(tmp_path / "a" / "gradients.json", 9, gradient_norm=1.0, **LOSSES)
    norms = put(tmp_path / "a" / "norms.json", 1, spectral_norm=1.0)
    assert newest_scores(None, tmp_path)[0] == losses
    assert newest_scores("spectral_norm", tmp_path)[0] == norms
    other = put(tmp_path / "a" / "norms.json", 1, "sha256:2", spectral_norm=1.0)
    assert newest_scores(None, tmp_path)[0] == other


def test_the_newest_scores_say_which_model_is_meant(tmp_path: Path) -> None:
    put(tmp_path / "a" / "gradients.json", 9, **LOSSES)
    newer = put(tmp_path / "b" / "norms.json", 1, spectral_norm=1.0)
    assert newest_scores(None, tmp_path)[0] == newer
    assert newest_scores("loss_increase", tmp_path)[0].parent.name == "a"


def test_a_measured_divergence_serves_where_there_is_nothing_else(tmp_path: Path) -> None:
    divergence = put(tmp_path / "a" / "divergence.json", 1, **LOSSES)
    assert newest_scores(None, tmp_path)[0] == divergence
    losses = put(tmp_path / "a" / "gradients.json", 9, **LOSSES)
    assert newest_scores(None, tmp_path)[0] == losses
    assert newest_scores("loss_increase", tmp_path)[0] == losses
    put(tmp_path / "b" / "norms.json", 5, spectral_norm=1.0)
    assert newest_scores(None, tmp_path)[0] == losses


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a" / "norms.json", 1, spectral_norm=1.0)
    with pytest.raises(InvalidFile, match=r"no scores with loss_increase(.|\n)*kvprof gradients"):
        newest_scores("loss_increase", tmp_path)
    with pytest.raises(UsageError, match="did you mean 'loss_increase'"):
        newest_scores("loss_incrase", tmp_path)


def plan(solver: dict[str, Any] | None, key: dict[str, Any] | None = None, **budget: Any) -> BitPlan:
    tensor = {"bits": 4, "group_size": 32, "axis": "token"}
    return BitPlan.model_validate(
        {
            "model": {"num_layers": 1},
            "budget": budget or None,
            "quantizer": {},
            "window": {"sink_tokens": 0, "recent_tokens": 0},
            "layers": [{"layer": 0, "key": tensor | (key or {}), "value": tensor | {"bits": 2}}],
            "solver": solver,
        }
    )


@pytest.mark.parametrize(
    ("metric", "unit", "name"),
    [
        ("loss_increase", "stored", "plan-2.50.json"),
        ("loss_increase", "nominal", "plan-2.50-nominal.json"),
        ("gradient_norm", "nominal", "plan-2.50.json"),
        ("gradient_norm", "stored", "plan-2.50-stored.json"),
    ],
)
def test_a_plan_is_named_by_its_budget_and_by_an_unusual_unit(metric: str, unit: str, name: str) -> None:
    assert plan_name(plan({"method": "exact", "metric": metric}, requested=2.5, unit=unit)) == name


def test_other_requests_have_names_of_their_own() -> None:
    exact = {"method": "exact", "metric": "loss_increase"}
    assert plan_name(plan(exact, requested=1.5 * 2**30, unit="bytes")) == "plan-1.50GiB.json"
    assert plan_name(plan(exact), max_kl="0.010") == "plan-kl-0.01.json"
    assert plan_name(plan(exact), max_kl="1e-5") == "plan-kl-1e-05.json"
    greedy = {"method": "norm-greedy", "metric": "spectral_norm"}
    assert plan_name(plan(greedy, requested=3.0, unit="stored")) == "plan-norm-greedy-3.00-stored.json"
    assert plan_name(plan({"method": "uniform"})) == "plan-uniform-k4v2.json"
    rotated = {"scheme": "rotated", "group_size": 64}
    assert plan_name(plan({"method": "uniform"}, rotated)) == "plan-uniform-rot4-int2g32.json"
