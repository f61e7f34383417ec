"""Files as a person would write them, and geometries to put in them."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def scores_json() -> dict[str, Any]:
    """Return the least that is a Scores file: two layers, nothing but what a budget is spent by."""
    return {
        "schema": "kvprof.scores/1",
        "layers": [
            {"layer": 0, "key": {"spectral_norm": 62.03}, "value": {"spectral_norm": 3.44}},
            {"layer": 1, "key": {"spectral_norm": 41.5}, "value": {"spectral_norm": 4}},
        ],
    }


@pytest.fixture
def plan_json() -> dict[str, Any]:
    """Return the least that is a BitPlan file."""
    return {
        "schema": "kvprof.plan/1",
        "model": {"num_layers": 2},
        "quantizer": {"scale_dtype": "float16", "zero_dtype": "float16", "rotation_seed": 0},
        "window": {"sink_tokens": 4, "recent_tokens": 128},
        "layers": [
            {
                "layer": layer,
                "key": {"bits": 4, "group_size": 32, "axis": "channel"},
                "value": {"bits": 2, "group_size": 64, "axis": "token"},
            }
            for layer in range(2)
        ],
    }


@pytest.fixture
def hybrid_geometry_json() -> dict[str, Any]:
    """Return a model of five layers of which a plan covers the first and the last."""
    wide = {"kv_heads": 2, "key_head_dim": 64, "value_head_dim": 64}
    nothing = {"kv_heads": 0, "key_head_dim": 0, "value_head_dim": 0}
    return {
        "dtype": "bfloat16",
        "layers": [
            {"layer": 0, "kind": "full", **wide},
            {"layer": 1, "kind": "sliding", **wide, "window": 512, "skipped": "sliding window of 512 tokens"},
            {"layer": 2, "kind": "recurrent", **nothing, "skipped": "recurrent layer"},
            {"layer": 3, "kind": "shared", **nothing, "skipped": "layer that reads another layer's keys and values"},
            {"layer": 4, "kind": "full", "kv_heads": 1, "key_head_dim": 128, "value_head_dim": 80},
        ],
    }
