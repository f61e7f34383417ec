"""Scores with a loss for each format of each tensor, made by hand or by a generator; plans in formats by name."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from kvprof import BitPlan, Scores
from kvprof.records.formats import TENSORS, TensorName, format_named

Samples = Mapping[str, Sequence[float]]
"""Format name to one loss a sequence."""

HEAD_DIM = 64
FORMATS = {
    "key": ("int2g128", "int2g64c", "int3g128", "int3g64", "int4g128", "int4g64", "rot2", "rot3", "rot4", "int6g64"),
    "value": ("rot1", "rot2", "rot3", "rot4", "int2g64", "int3g64", "int4g64", "int6g64", "int8g64"),
}


def model_json(layers: int, fingerprint: str | None = "sha256:one") -> dict[str, Any]:
    return {"id": "handmade", "fingerprint": fingerprint, "architecture": "LlamaForCausalLM", "num_layers": layers}


def geometry_json(
    layers: int, kv_heads: int = 3, dtype: str = "bfloat16", skipped: Sequence[int] = ()
) -> dict[str, Any]:
    """Full attention in every layer, keys and values in heads of 64; `skipped` layers slide."""
    heads = {"kv_heads": kv_heads, "key_head_dim": HEAD_DIM, "value_head_dim": HEAD_DIM}
    slides = {"kind": "sliding", "window": 512, "skipped": "sliding window of 512 tokens"}
    return {
        "dtype": dtype,
        "layers": [{"layer": n, "kind": "full", **heads, **(slides if n in skipped else {})} for n in range(layers)],
    }


def scores_of(
    samples: Sequence[Mapping[TensorName, Samples]],
    *,
    geometry: dict[str, Any] | None = None,
    fingerprint: str | None = "sha256:one",
    sources: Mapping[str, Sequence[int]] | None = None,
    factor: float | None = None,
    keep_samples: bool = True,
) -> Scores:
    """Scores of layers 0, 1, ... of which each tensor has a loss a format and sequence.

    sources: a dataset's name to the sequences that are its own.
    """

    def tensor(losses: Samples) -> dict[str, Any]:
        found: dict[str, Any] = {"loss_increase": {name: _mean(numbers) for name, numbers in losses.items()}}
        if keep_samples:
            found["loss_increase_samples"] = {name: list(numbers) for name, numbers in losses.items()}
        if sources is not None:
            found["loss_increase_by_source"] = {
                dataset: {name: _mean([numbers[n] for n in own]) for name, numbers in losses.items()}
                for dataset, own in sources.items()
            }
        return found

    number = len(next(iter(samples[0]["key"].values())))
    calibration: dict[str, Any] = {
        "dataset": "handmade", "sequences": number, "sequence_length": 512, "tokens": 512 * number, "seed": 0,
    }  # fmt: skip
    if sources is not None:
        calibration["sources"] = [
            {"dataset": dataset, "sequences": len(own), "tokens": 512 * len(own)} for dataset, own in sources.items()
        ]
        owner = {n: place for place, own in enumerate(sources.values()) for n in own}
        calibration["source_of"] = [owner[n] for n in range(number)]
    value: dict[str, Any] = {
        "schema": "kvprof.scores/1",
        "source": "gradients",
        "model": model_json(len(samples), fingerprint),
        "geometry": geometry,
        "calibration": calibration,
        "layers": [
            {"layer": layer, **{name: tensor(entry[name]) for name in TENSORS}} for layer, entry in enumerate(samples)
        ],
    }
    if factor is not None:
        value["kl_calibration"] = {"factor": factor, "plans": 4, "sequences": 8, "spread": 1.1}
    return Scores.from_json(value, "handmade")


def random_samples(layers: int, sequences: int, seed: int = 0, noise: float = 0.5) -> list[dict[TensorName, Samples]]:
    """Losses as models have them: each tensor's scale is log-normal, more stored bits lose less, texts differ."""
    draw = random.Random(seed)
    found: list[dict[TensorName, Samples]] = []
    for _ in range(layers):
        entry: dict[TensorName, Samples] = {}
        for name in TENSORS:
            scale = 1e-3 * draw.lognormvariate(0, 1.2)
            losses: dict[str, list[float]] = {}
            hard = [draw.lognormvariate(0, noise) for _ in range(sequences)]
            for form in FORMATS[name]:
                bits = float(format_named(form, name, HEAD_DIM).stored_bits(HEAD_DIM))
                mean = scale * 4.0**-bits * draw.lognormvariate(0, 0.2) * (0.5 if form.startswith("rot") else 1)
                losses[form] = [16 * mean * text * draw.lognormvariate(0, noise / 2) for text in hard]
            entry[name] = losses
        found.append(entry)
    return found


def random_scores(layers: int = 30, sequences: int = 16, seed: int = 0, noise: float = 0.5, **options: Any) -> Scores:
    """Scores of a model shaped as the demo model is."""
    samples = random_samples(layers, sequences, seed, noise)
    return scores_of(samples, geometry=geometry_json(layers), **options)


def plan_of(
    formats: Sequence[tuple[str, str]],
    *,
    geometry: dict[str, Any] | None = None,
    fingerprint: str | None = "sha256:one",
    **fields: Any,
) -> BitPlan:
    """A plan of layers 0, 1, ... that gives each (key, value) formats by name; more fields as the file has them."""
    return BitPlan.from_json(plan_json(formats, geometry=geometry, fingerprint=fingerprint, **fields), "handmade")


def plan_json(
    formats: Sequence[tuple[str, str]],
    *,
    geometry: dict[str, Any] | None = None,
    fingerprint: str | None = "sha256:one",
    **fields: Any,
) -> dict[str, Any]:
    layers = [
        {
            "layer": layer,
            **{name: format_named(form, name, HEAD_DIM).model_dump() for name, form in zip(TENSORS, pair, strict=True)},
        }
        for layer, pair in enumerate(formats)
    ]
    return {
        "schema": "kvprof.plan/1",
        "model": model_json(len(formats), fingerprint),
        "quantizer": {},
        "window": {"sink_tokens": 4, "recent_tokens": 128},
        "geometry": geometry,
        "layers": layers,
    } | fields


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
