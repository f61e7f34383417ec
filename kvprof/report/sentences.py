"""What can be said of scores in a sentence: verdicts and remarks.

Reads records, returns text; does not know where it is printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvprof.records.formats import TENSORS
from kvprof.records.geometry import CacheGeometry, bytes_text
from kvprof.records.scores import SCALAR_METRICS, LatentScores, Scores
from kvprof.records.words import layers_text


def larger(key: float, value: float) -> str:
    """Return which of two norms is larger, K or V, or = where they differ by no more than rounding."""
    return "=" if math.isclose(key, value, rel_tol=1e-6) else "K" if key > value else "V"


def latent_remarks(geometry: CacheGeometry | None) -> list[str]:
    """Return what stands for K and V in layers of latent attention, and what an indexer caches beside it."""
    layers = [] if geometry is None else [layer for layer in geometry.layers if layer.is_latent]
    if not layers:
        return []
    numbers = layers_text([layer.layer for layer in layers])
    remarks = [f"{numbers}: latent attention (MLA): K is the latent, V the rotary part of the keys"]
    if indexed := [layer for layer in layers if layer.indexer_width]:
        widths = " or ".join(str(width) for width in sorted({layer.indexer_width for layer in indexed}))
        numbers = layers_text([layer.layer for layer in indexed])
        remarks.append(f"{numbers}: an indexer caches {widths} numbers a token more, in full precision in any plan")
    return remarks


def state_remarks(geometry: CacheGeometry | None) -> list[str]:
    """Return what of a cache's bytes is recurrent states, and of which layers their size is not known."""
    remarks = []
    if geometry is not None and (size := geometry.state_bytes()):
        layers = layers_text([layer.layer for layer in geometry.layers if layer.state is not None])
        remarks.append(f"{layers}: recurrent states of {bytes_text(size)} a sequence, counted in every context")
    if geometry is not None and geometry.uncounted:
        layers = layers_text([layer.layer for layer in geometry.uncounted])
        remarks.append(f"{layers}: recurrent states whose size is not known, and is not counted")
    return remarks


def latent_reading(geometry: CacheGeometry | None) -> str | None:
    """Return how to read a page on keys and values where a model caches latents, or None where it caches none."""
    if geometry is None or not any(layer.is_latent for layer in geometry.layers):
        return None
    return (
        "this model has latent attention (MLA): what this report says of keys (K) is of the latents that it caches, "
        "and what it says of values (V) is of the rotary part (rope) of the keys"
    )


def indexer_remark(geometry: CacheGeometry | None) -> str | None:
    """Return what predictions leave out where an indexer selects the keys that are read, or None without one."""
    if geometry is None or not any(layer.indexer_width for layer in geometry.planned):
        return None
    return (
        "predicted losses take the keys that indexers select for fixed; rounding changes the selection: measure plans "
        "with `kvprof evaluate`"
    )


def norm_verdict(scores: Scores) -> str | None:
    """Return one line on the key-value norm disparity: in how many layers K exceeds V, in each norm.

    None of a model with latent attention, whose two parts are no keys and values.
    """
    if any(isinstance(entry, LatentScores) for entry in scores.layers):
        return None
    winners = {
        metric: [larger(*pair) for pair in zip(*(scores.column(metric, tensor) for tensor in TENSORS), strict=True)]
        for metric in ("spectral_norm", "frobenius_norm")
    }
    total = len(scores.layers)
    spectral, frobenius = (found.count("K") for found in winners.values())
    seen = {winner for found in winners.values() for winner in found}
    if seen == {"K"}:
        moral = "keys are larger everywhere, as arXiv 2502.15075 expects"
    elif seen == {"V"}:
        moral = "values are larger everywhere, against arXiv 2502.15075"
    else:
        moral = "the key-value norm disparity is not universal"
    return f"spectral K > V in {spectral} of {total} layers, Frobenius K > V in {frobenius} of {total}: {moral}"


def score_remarks(scores: Scores, metrics: Sequence[str] | None = None) -> list[str]:
    """Return a sentence for each metric that cannot tell which layers need bits, and why."""
    scalar = [metric for metric in metrics or scores.metrics if metric in SCALAR_METRICS]
    remarks = [
        f"{metric} of the {tensor}s varies by less than 1 % over all layers: it carries no information to rank them by"
        for metric in scalar
        for tensor in TENSORS
        if scores.is_flat(metric, tensor)
    ]
    if any(metric != "gradient_norm" for metric in scalar) and any(
        entry.key.gain_rms is not None for entry in scores.layers
    ):
        latent = all(isinstance(entry, LatentScores) for entry in scores.layers)
        what = "latents are normalised after their projection" if latent else "keys are normalised after k_proj"
        remarks.append(f"{what}: their weight norm says nothing about the cache's scale")
    return remarks
