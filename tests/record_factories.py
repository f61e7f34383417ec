"""Records that pictures are drawn from, of any number of layers, made by a generator that is the same each time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from score_factories import FORMATS, geometry_json, model_json, plan_json, random_samples, scores_of

from kvprof import BitPlan, Scores
from kvprof.records.audit import Audit, AuditPoint
from kvprof.records.document import Document
from kvprof.records.evaluation import Evaluation
from kvprof.records.formats import TENSORS
from kvprof.records.frontier import Frontier, FrontierPoint
from kvprof.records.spectra import Spectra

NAMES = (
    "plan-2.50", "uniform int2g64c/rot2", "kvmix", "norm-greedy spectral", "norm-greedy frobenius", "random",
    "kvmix, as published", "spectral, as published", "frobenius, as published",
)  # fmt: skip


def norms(layers: int, skipped: Sequence[int] = (), seed: int = 0) -> Scores:
    """Norms as a model has them: the first key's by far the largest."""
    draw = random.Random(seed)

    def tensor(scale: float) -> dict[str, float]:
        return {"spectral_norm": scale * draw.uniform(8, 12), "frobenius_norm": scale * draw.uniform(50, 90)}

    entries = [{"layer": n, "key": tensor(5 if n == 0 else 1), "value": tensor(0.6)} for n in range(layers)]
    return Scores.from_json(_file("scores", layers, skipped) | {"source": "norms", "layers": entries}, "norms")


def gradients(layers: int, skipped: Sequence[int] = (), seed: int = 0) -> Scores:
    """Gradient norms with standard errors, and a predicted loss of each format."""
    draw = random.Random(seed)
    scores = scores_of(random_samples(layers, 4, seed), geometry=geometry_json(layers, skipped=skipped))
    document = scores.model_dump(mode="json", by_alias=True)
    for entry in document["layers"]:
        for name in TENSORS:
            norm = draw.lognormvariate(-2, 0.8)
            entry[name] |= {"gradient_norm": norm, "gradient_norm_stderr": norm * draw.uniform(0.02, 0.3)}
    return Scores.from_json(document, "gradients")


def plan(layers: int, skipped: Sequence[int] = (), seed: int = 0, formats: Any = FORMATS) -> BitPlan:
    """A plan of formats drawn by lot, the skipped layers left out."""
    draw = random.Random(seed)
    pairs = [(draw.choice(formats["key"]), draw.choice(formats["value"])) for _ in range(layers)]
    document = plan_json(pairs, geometry=geometry_json(layers, skipped=skipped))
    document["layers"] = [entry for entry in document["layers"] if entry["layer"] not in skipped]
    document["skipped"] = [{"layer": layer, "reason": "sliding window of 512 tokens"} for layer in skipped]
    return BitPlan.from_json(document, "plan")


def spectra(layers: int, skipped: Sequence[int] = (), dims: int = 64, seed: int = 0) -> Spectra:
    """Singular values that fall off, of three heads."""
    draw = random.Random(seed)

    def spectrum(scale: float) -> dict[str, Any]:
        fall = draw.uniform(0.05, 0.1)
        mean = [scale * math.exp(-fall * index - (2 if index else 0)) for index in range(dims)]
        return {
            "heads": 3, "mean": mean, "low": [0.7 * value for value in mean], "high": [1.5 * value for value in mean],
            "spectral_norm": mean[0], "frobenius_norm": 1.01 * math.hypot(*mean),
        }  # fmt: skip

    entries = [{"layer": n, "key": spectrum(900), "value": spectrum(60)} for n in range(layers)]
    return Spectra.from_json(_file("spectra", layers, skipped) | {"layers": entries}, "spectra")


def frontier(layers: int = 30, budgets: int = 120, knees: Sequence[int] = (8, 40, 90)) -> Frontier:
    """Plans whose loss falls by half with every half of a bit."""
    points = []
    for index in range(budgets):
        bits = 1.75 + 6.75 * index / max(1, budgets - 1)
        kl = 0.1 * 4 ** (1.75 - bits) + 4e-6
        points.append(
            FrontierPoint(
                budget=bits, nominal_bits=bits, stored_bits=bits, compression=16 / bits, predicted_kl_nats=kl,
                predicted_kl_stderr_nats=0.1 * kl, plan_digest=f"p{index}", optimal=True, knee=index in knees,
            )
        )  # fmt: skip
    window = {"sink_tokens": 4, "recent_tokens": 128}
    return Frontier(
        model=model_json(layers), metric="loss_increase", unit="stored", window=window, points=tuple(points)
    )


def evaluation(layers: int = 30, names: Sequence[str] = NAMES, longest: int = 1024, first: int = 0) -> Evaluation:
    """A plan and its rivals, each of them worse than the one before; stretches double in length."""
    results = []
    for place, name in enumerate(names):
        parts = []
        low, high = 0, 16
        while low < longest:
            start, end = max(low, first), min(high, longest)
            if start < end:
                kl = 0.004 * 1.5**place * (1 + low / longest)
                parts.append(
                    {"first": start, "last": end - 1, "tokens": end - start, "kl_nats": kl, "top1_agreement": 0.9}
                )
            low, high = high, 2 * high
        tokens = sum(part["tokens"] for part in parts)
        mean = math.fsum(part["tokens"] * part["kl_nats"] for part in parts) / tokens
        results.append(
            {
                "name": name, "role": "rival" if place else "plan", "digest": f"sha256:{place}", "nominal_bits": 2.2,
                "stored_bits": 3.49 if name == "kvmix, as published" else 2.5 - 0.01 * place, "bytes_per_token": 100.0,
                "contexts": [{"tokens": 512, "bytes": 1000, "bytes_at_16_bits": 4000, "compression": 4.0}],
                "kl_nats": mean, "kl_stderr_nats": 0.1 * mean, "kl_p99_nats": 9 * mean, "kl_excess_nats": 0.0,
                "top1_agreement": 0.9, "perplexity": 20.0, "by_position": parts,
            }
        )  # fmt: skip
    text = {"dataset": "builtin", "sequences": 2, "sequence_length": longest, "tokens": 2 * longest, "seed": 0}
    document = {
        "schema": "kvprof.evaluation/1", "model": model_json(layers), "dtype": "float32", "text": text, "path": "fast",
        "measured_from": first, "reference_perplexity": 18.0, "plans": results,
    }  # fmt: skip
    return Evaluation.from_json(document, "evaluation")


def audit(formats: tuple[tuple[str, str, int], ...], layers: int = 30, spread: float = 0.6, **more: Any) -> Audit:
    """Points about the diagonal, each tensor of every layer in each format (tensor, name, bits).

    spread: of the logarithm of predicted over measured.
    """
    draw = random.Random(3)
    points = []
    for tensor, name, bits in formats:
        for layer in range(layers):
            nats = 10 ** draw.gauss(-bits, 0.6)
            points.append(
                AuditPoint(
                    layer=layer,
                    tensor=tensor,
                    format=name,
                    bits=bits,
                    measured_nats=nats,
                    measured_stderr_nats=2 * nats,  # reaches below zero, which a logarithm does not have
                    scores={"loss_increase": nats * math.exp(draw.gauss(-0.3, spread))},
                )
            )
    fields = {"points": points, "agreements": (), "ratios": (), "plans": ()} | more
    return Audit(model={"id": "a-model", "num_layers": layers}, **fields)


def folder_of(layers: int, skipped: Sequence[int] = ()) -> dict[str, Document]:
    """Every record of one model, by the name of its file."""
    return {
        "norms.json": norms(layers, skipped),
        "spectra.json": spectra(layers, skipped),
        "gradients.json": gradients(layers, skipped),
        "plan-2.50.json": plan(layers, skipped),
        "frontier.json": frontier(layers),
        "evaluation.json": evaluation(layers),
    }


def _file(kind: str, layers: int, skipped: Sequence[int]) -> dict[str, Any]:
    geometry = geometry_json(layers, skipped=skipped)
    return {"schema": f"kvprof.{kind}/1", "model": model_json(layers), "geometry": geometry}
