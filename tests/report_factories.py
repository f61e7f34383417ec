"""A model's folder with one file of every kind that a report shows, all of one handmade model, every number known."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from score_factories import geometry_json, model_json, plan_of, random_scores

from kvprof.records.audit import Audit
from kvprof.records.evaluation import Evaluation
from kvprof.records.frontier import Frontier
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores
from kvprof.records.spectra import Spectra

LAYERS = 4
PAIRS = (("int4g64", "rot2"), ("int3g64", "rot3"), ("int2g128", "rot2"), ("int2g64c", "int2g64"))
TEXT = {"dataset": "builtin", "split": "held-out", "sequences": 2, "sequence_length": 512, "tokens": 1024, "seed": 0}


def norms(layers: int = LAYERS, skipped: Sequence[int] = (), **fields: Any) -> Scores:
    """Keys are larger than values by spectral norm in all layers but the last, whose key's norm is 0.5."""
    entries = [
        {
            "layer": n,
            "key": {"spectral_norm": 9.25 - n % 8 if n < layers - 1 else 0.5, "frobenius_norm": 30.0},
            "value": {"spectral_norm": 1.125, "frobenius_norm": 31.5 + n},
        }
        for n in range(layers)
    ]
    return Scores.from_json(_scores("norms", entries, skipped) | fields, "norms")


def gradients(layers: int = LAYERS, skipped: Sequence[int] = (), **fields: Any) -> Scores:
    """Losses as models have them, and gradient norms."""
    value = json.loads(random_scores(layers, 4).to_text())
    value["geometry"] = geometry_json(layers, skipped=skipped)
    for entry in value["layers"]:
        for tensor, norm in (("key", 0.0625), ("value", 0.375)):
            entry[tensor] |= {"gradient_norm": norm * (1 + entry["layer"]), "gradient_norm_stderr": norm / 8}
    return Scores.from_json(value | fields, "gradients")


def spectra(layers: int = LAYERS, skipped: Sequence[int] = (), **fields: Any) -> Spectra:
    """Singular values that fall by a constant factor, keys faster than values; heads lie a tenth apart."""
    entries = []
    for n in range(layers):
        entry: dict[str, Any] = {"layer": n}
        for tensor, first, factor in (("key", 200.0 + n, 0.8), ("value", 50.0 - n / 4, 0.95)):
            mean = [first * factor**place for place in range(64)]
            entry[tensor] = {
                "heads": 3,
                "mean": mean,
                "low": [0.9 * value for value in mean],
                "high": [1.1 * value for value in mean],
                "spectral_norm": first,
                "frobenius_norm": 1.01 * sum(value * value for value in mean) ** 0.5,
            }
        entries.append(entry)
    value = {
        "schema": "kvprof.spectra/1",
        "model": model_json(layers),
        "calibration": TEXT,
        "geometry": geometry_json(layers, skipped=skipped),
        "layers": entries,
    }
    return Spectra.from_json(value | fields, "spectra")


def plan(scores: Scores | None = None, layers: int = LAYERS, skipped: Sequence[int] = (), **fields: Any) -> BitPlan:
    """A plan of four formats in turn that says it stores 3 bits and loses 0.0125 nats."""
    pairs = [PAIRS[n % len(PAIRS)] for n in range(layers)]
    made = plan_of(pairs, geometry=geometry_json(layers))
    value = json.loads(made.to_text())
    value["geometry"] = geometry_json(layers, skipped=skipped)
    value["layers"] = [entry for entry in value["layers"] if entry["layer"] not in skipped]
    value["skipped"] = [{"layer": n, "reason": "sliding window of 512 tokens"} for n in skipped]
    value["budget"] = {"requested": 3.0, "unit": "stored", "nominal_bits": 2.5, "stored_bits": 3.0}
    value["solver"] = {"method": "exact", "metric": "loss_increase", "predicted_kl_nats": 0.0125}
    value["provenance"] = {"scores": None if scores is None else scores.digest, "command": "kvprof allocate --budget 3"}
    return BitPlan.from_json(value | fields, "plan")


def frontier(scores: Scores | None = None, layers: int = LAYERS, **fields: Any) -> Frontier:
    """Eleven budgets, each half a bit more, with a knee at 3.5 bits."""
    points = [
        {
            "budget": bits,
            "nominal_bits": bits - 0.25,
            "stored_bits": bits,
            "compression": 16 / bits,
            "predicted_kl_nats": 4.0**-bits,
            "predicted_kl_stderr_nats": 4.0**-bits / 10,
            "plan_digest": f"sha256:{bits}",
            "optimal": True,
            "knee": bits == 3.5,
        }
        for bits in (2 + place / 2 for place in range(11))
    ]
    value = {
        "schema": "kvprof.frontier/1",
        "model": model_json(layers),
        "scores": None if scores is None else scores.digest,
        "command": "kvprof frontier --from 2 --to 7 --points 11",
        "metric": "loss_increase",
        "unit": "stored",
        "window": {"sink_tokens": 4, "recent_tokens": 128},
        "points": points,
    }
    return Frontier.from_json(value | fields, "frontier")


def result(name: str, role: str, kl: float, stored: float, digest: str) -> dict[str, Any]:
    """One plan's results, of two stretches of positions."""
    return {
        "name": name,
        "role": role,
        "digest": digest,
        "nominal_bits": stored - 0.5,
        "stored_bits": stored,
        "bytes_per_token": 288.0,
        "contexts": [{"tokens": 512, "bytes": 1000, "bytes_at_16_bits": 2000, "compression": 2.0}],
        "kl_nats": kl,
        "kl_stderr_nats": kl / 16,
        "kl_p99_nats": 3 * kl,
        "top1_agreement": 0.875,
        "perplexity": 20.0,
        "by_position": [
            {"first": 256, "last": 383, "tokens": 256, "kl_nats": kl / 2, "top1_agreement": 0.9375},
            {"first": 384, "last": 511, "tokens": 256, "kl_nats": kl * 1.5, "top1_agreement": 0.8125},
        ],
    }


def evaluation(of: BitPlan | None = None, layers: int = LAYERS, **fields: Any) -> Evaluation:
    """A plan of 0.0156 nats and two rivals that lose more."""
    value = {
        "schema": "kvprof.evaluation/1",
        "model": model_json(layers),
        "dtype": "bfloat16",
        "text": TEXT,
        "path": "fast",
        "measured_from": 256,
        "reference_perplexity": 18.0,
        "plans": [
            result("plan-3.00", "plan", 0.015625, 3.0, "sha256:unknown" if of is None else of.digest),
            result("kvmix", "rival", 0.0625, 3.0, "sha256:k"),
            result("random", "rival", 0.03125, 2.75, "sha256:r"),
        ],
    }
    return Evaluation.from_json(value | fields, "evaluation")


def audit(layers: int = LAYERS, **fields: Any) -> Audit:
    """Every tensor at 2 bits, measured at twice what was predicted."""
    points = [
        {
            "layer": n,
            "tensor": tensor,
            "format": "int2g64",
            "bits": 2,
            "measured_nats": 2 * 1e-4 * (n + 1),
            "measured_stderr_nats": 1e-5,
            "scores": {"loss_increase": 1e-4 * (n + 1)},
        }
        for n in range(layers)
        for tensor in ("key", "value")
    ]
    group = {"label": "loss_increase", "group": "2 bits", "bits": 2, "tensors": 2 * layers}
    value = {
        "schema": "kvprof.audit/1",
        "model": model_json(layers),
        "points": points,
        "agreements": [group | {"spearman": 0.96875}],
        "ratios": [
            group | {"median": 0.5, "low": 0.375, "high": 0.625, "worst": 0.25, "worst_layer": 1, "worst_tensor": "key"}
        ],
        "plans": [
            {
                "name": "plan-3.00",
                "digest": "sha256:0",
                "stored_bits": 3.0,
                "predicted_kl_nats": 0.0125,
                "measured_kl_nats": 0.015625,
            }
        ],
    }
    return Audit.from_json(value | fields, "audit")


def save_all(folder: Path, layers: int = LAYERS, skipped: Sequence[int] = ()) -> Path:
    """Write a file of each kind into a folder, as the commands name them."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = gradients(layers, skipped)
    made = plan(scores, layers, skipped)
    norms(layers, skipped).save(folder / "norms.json")
    scores.save(folder / "gradients.json")
    spectra(layers, skipped).save(folder / "spectra.json")
    made.save(folder / "plan-3.00.json")
    frontier(scores, layers).save(folder / "frontier.json")
    evaluation(made, layers).save(folder / "evaluation.json")
    audit(layers).save(folder / "audit.json")
    return folder


def age(path: Path, seconds: int) -> None:
    """Make a file so much older."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - seconds * 10**9))


def _scores(source: str, entries: list[dict[str, Any]], skipped: Sequence[int]) -> dict[str, Any]:
    return {
        "schema": "kvprof.scores/1",
        "source": source,
        "model": model_json(len(entries)),
        "geometry": geometry_json(len(entries), skipped=skipped),
        "layers": entries,
    }
