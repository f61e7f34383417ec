"""What a frontier file must hold to be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvprof.errors import InvalidFile, Mismatch
from kvprof.records.frontier import Frontier
from kvprof.records.geometry import CacheGeometry
from kvprof.records.kinds import load_any


def point(budget: float, **fields: Any) -> dict[str, Any]:
    return {
        "budget": budget,
        "nominal_bits": budget - 0.25,
        "stored_bits": budget,
        "compression": 16 / budget,
        "predicted_kl_nats": 4.0**-budget,
        "plan_digest": f"sha256:{budget}",
        "optimal": True,
        "knee": False,
    } | fields


def frontier_json(*points: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "schema": "kvprof.frontier/1",
        "metric": "loss_increase",
        "unit": "stored",
        "window": {"sink_tokens": 4, "recent_tokens": 128},
        "points": list(points),
    } | fields


def test_a_frontier_is_saved_and_found_by_its_schema(tmp_path: Path) -> None:
    frontier = Frontier.from_json(frontier_json(point(2.5), point(3.0, knee=True), point(4.0)), "mine")
    assert frontier.knees == (frontier.points[1],)
    assert load_any(frontier.save(tmp_path / "frontier.json")) == frontier


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (frontier_json(), "points is empty"),
        (frontier_json(point(3.0), point(2.5)), "budgets must ascend, each once: 2.5 follows 3.0"),
        (frontier_json(point(3.0), point(3.0)), "budgets must ascend"),
        (frontier_json(point(3.0, stored_bits=3.1, compression=16 / 3.1)), "a budget of 3.0 stored bits has 3.1"),
        (frontier_json(point(3.0, nominal_bits=3.5), unit="nominal"), "a budget of 3.0 nominal bits has 3.5"),
        (frontier_json(point(3.0, compression=4.0)), "compression at a budget of 3.0 is 4.0"),
        (frontier_json(point(3.0, bytes=100)), "bytes and context stand together"),
        (frontier_json(point(3.0), context=4096), "bytes and context stand together"),
        (frontier_json(point(3.0, predicted_kl_nats=-1.0)), "greater than or equal to 0"),
        (frontier_json(point(3.0, predicted_kl_nats=float("nan"))), "finite"),
        (frontier_json(point(3.0, surplus=1)), "unknown key points[0].surplus"),
        (frontier_json(point(3.0), unit="bytes"), "unit"),
    ],
)
def test_a_frontier_that_contradicts_itself_is_refused(value: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidFile) as caught:
        Frontier.from_json(value, "mine")
    assert words in str(caught.value)


def test_a_frontier_of_another_model_does_not_fit() -> None:
    layer = {"layer": 0, "kind": "full", "kv_heads": 1, "key_head_dim": 8, "value_head_dim": 8}
    geometry = CacheGeometry.model_validate({"dtype": "float16", "layers": [layer]})
    model = {"id": "mine", "fingerprint": "sha256:1", "num_layers": 1}
    frontier = Frontier.from_json(frontier_json(point(3.0), model=model), "mine")
    frontier.check_fits(geometry, "sha256:1")
    with pytest.raises(Mismatch, match="the frontier is for another model"):
        frontier.check_fits(geometry, "sha256:2")
