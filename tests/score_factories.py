"""Scores with a loss for each format of each tensor, made by hand or by a generator; plans in formats by name."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvprof import BitPlan, Scores
from kvprof.records.document import ModelInfo
from kvprof.records.effects import encode
from kvprof.records.formats import TENSORS, TensorName, format_named
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import USUAL_WINDOW
from kvprof.records.sampled import TensorSamples, gradient_scores
from kvprof.records.scores import CalibrationInfo, DecodingSetup

Floats = NDArray[np.float64]
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


def encoded(series_N: Floats, block_tokens: int = 1) -> str:
    """Return one sequence's effects as a measurement writes them."""
    sums = [float(series_N[at : at + block_tokens].sum()) for at in range(0, len(series_N), block_tokens)]
    return encode(float(np.square(series_N).sum()), sums)


def scores_of_effects(
    effects: Sequence[Mapping[TensorName, Mapping[str, Sequence[Floats]]]],
    *,
    block_tokens: int = 1,
    sources: Sequence[int] | None = None,
    factor: float | None = None,
) -> Scores:
    """Scores as a measurement makes them of layers 0, 1, ... in heads of 64.

    effects: of each layer and tensor, a format's name to each sequence's effects, position by position.
    sources: for each sequence the place of its text among several.
    """
    rows = next(iter(effects[0]["key"].values()))
    counted = [len(row) for row in rows]
    text = CalibrationInfo(
        dataset="handmade",
        sequences=len(rows),
        sequence_length=2 * max(counted),
        tokens=2 * sum(counted),
        seed=0,
        **(
            {}
            if sources is None
            else {
                "source_of": tuple(sources),
                "sources": tuple(
                    {"dataset": f"text {of}", "sequences": list(sources).count(of), "tokens": 1}
                    for of in sorted(set(sources))
                ),
            }
        ),
    )
    samples = {
        (layer, tensor): TensorSamples(
            [1.0] * len(rows),
            {name: [encoded(row, block_tokens) for row in series] for name, series in entry[tensor].items()},
        )
        for layer, entry in enumerate(effects)
        for tensor in TENSORS
    }
    scores = gradient_scores(
        samples,
        text,
        ModelInfo(**model_json(len(effects))),
        CacheGeometry.model_validate(geometry_json(len(effects))),
        DecodingSetup(window=USUAL_WINDOW, suffix_fraction=0.5, tokens=sum(counted)),
        block_tokens,
        counted,
    )
    value = scores.model_dump(mode="json", by_alias=True)
    if factor is not None:
        value["kl_calibration"] = {"factor": factor, "plans": 4, "sequences": 8, "spread": 1.1}
    return Scores.from_json(value, "handmade")


def random_effects(
    layers: int,
    sequences: int,
    counted: int,
    seed: int = 0,
    *,
    names: Mapping[TensorName, Sequence[str]] = FORMATS,
    spread: float = 1.2,
    common: float = 0.0,
) -> list[dict[TensorName, dict[str, list[Floats]]]]:
    """Effects of independent positions; each tensor's scale is log-normal, and more stored bits have smaller ones.

    common: the share of the variance of 2-bit formats of values that all layers have alike.
    """
    draw = np.random.default_rng(seed)
    shared = [draw.standard_normal(counted) for _ in range(sequences)]
    found: list[dict[TensorName, dict[str, list[Floats]]]] = []
    for _ in range(layers):
        entry: dict[TensorName, dict[str, list[Floats]]] = {}
        for tensor in TENSORS:
            scale = 0.3 * np.exp(spread / 2 * draw.standard_normal())
            entry[tensor] = {}
            for name in names[tensor]:
                form = format_named(name, tensor, HEAD_DIM)
                size = scale * 2.0 ** -float(form.stored_bits(HEAD_DIM)) * np.exp(0.1 * draw.standard_normal())
                share = common if tensor == "value" and form.bits == 2 else 0.0
                entry[tensor][name] = [
                    size * (np.sqrt(1 - share) * draw.standard_normal(counted) + np.sqrt(share) * one) for one in shared
                ]
        found.append(entry)
    return found


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
