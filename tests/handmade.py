"""Scores made by hand, with and without a geometry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvprof import BitPlan
from kvprof.records.geometry import CacheGeometry, KVLayer, RecurrentState
from kvprof.records.scores import Scores

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_norms.json").read_text())


def full(layer: int, kv_heads: int = 2, key_head_dim: int = 64, value_head_dim: int = 64) -> KVLayer:
    return KVLayer(
        layer=layer, kind="full", kv_heads=kv_heads, key_head_dim=key_head_dim, value_head_dim=value_head_dim
    )


def sliding(layer: int, window: int = 512) -> KVLayer:
    return full(layer).model_copy(
        update={"kind": "sliding", "window": window, "skipped": f"sliding window of {window} tokens"}
    )


def recurrent(layer: int) -> KVLayer:
    return KVLayer(
        layer=layer,
        kind="recurrent",
        kv_heads=0,
        key_head_dim=0,
        value_head_dim=0,
        skipped="recurrent state",
        state=RecurrentState(elements=700, float32_elements=90),
    )


def geometry(*layers: KVLayer, dtype: str = "bfloat16") -> CacheGeometry:
    return CacheGeometry.model_validate({"dtype": dtype, "layers": layers})


def scores(
    keys: Sequence[float],
    values: Sequence[float],
    geometry: CacheGeometry | None = None,
    metric: str = "spectral_norm",
    factor: float = 1.0,
) -> Scores:
    """Scores of one metric, for the layers that the geometry scores, or for 0, 1, 2, ..."""
    layers = [layer.layer for layer in geometry.scored] if geometry else range(len(keys))
    return Scores.model_validate(
        {
            "schema": "kvprof.scores/1",
            "geometry": geometry,
            "layers": [
                {"layer": layer, "key": {metric: key * factor}, "value": {metric: value * factor}}
                for layer, key, value in zip(layers, keys, values, strict=True)
            ],
        }
    )


def published(model: str, metric: str, factor: float = 1.0) -> Scores:
    """The norms that arXiv 2502.15075 published for a model."""
    (norms,) = (entry[metric] for entry in PUBLISHED["models"] if entry["model"] == model)
    return scores(norms["key"], norms["value"], metric=metric, factor=factor)


def uneven_scores(dtype: str = "bfloat16") -> Scores:
    """Five layers: one sliding, one recurrent, values wider than keys, a head dimension that no group of 32 divides."""
    shape = geometry(full(0, 2, 64, 128), sliding(1), full(2, 3, 80, 80), recurrent(3), full(4, 1, 64, 96), dtype=dtype)
    return scores([5.0, 1.0, 3.0, 2.0], [2.0, 1.0, 0.5, 4.0], shape)


def scored(
    *layers: tuple[Mapping[str, float], Mapping[str, float]], geometry: CacheGeometry | None = None, **fields: Any
) -> Scores:
    """Scores that have for each layer the losses of its key's formats and of its value's; more fields as in a file."""
    numbers = [layer.layer for layer in geometry.scored] if geometry else range(len(layers))
    return Scores.model_validate(
        {
            "schema": "kvprof.scores/1",
            "geometry": geometry,
            "layers": [
                {"layer": layer, "key": {"loss_increase": dict(key)}, "value": {"loss_increase": dict(value)}}
                for layer, (key, value) in zip(numbers, layers, strict=True)
            ],
        }
        | fields
    )


def format_names(plan: BitPlan) -> list[tuple[str, str]]:
    """The names of each layer's formats, key and value."""
    return [(entry.key.name, entry.value.name) for entry in plan.layers]
