"""How large are W_k and W_v? Spectral norm, Frobenius norm and stable rank, per layer and per KV head.

Reads the K and V projections as a stream; never holds the model. Does not know any text, and so not what the cache
holds: a norm after k_proj or a large bias makes these numbers blind, which `kvprof inspect` flags.
Source: arXiv 2502.15075, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvprof import __version__
from kvprof.models.identity import Fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.load import ModelSource, load_config
from kvprof.models.weights import LayerWeights, open_checkpoint, stream_projections
from kvprof.records.inventory import Inventory
from kvprof.records.scores import LayerScores, Scores, TensorScores

_SMALL = 256
"""Below this size all eigenvalues cost less than a Lanczos run."""
_STEPS = 300
_TOLERANCE = 1e-9
_CHUNK_BYTES = 16 * 2**20


def measure_norms(
    source: ModelSource, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Scores, Inventory]:
    """Measure every layer's W_k and W_v of a model, in whatever dtype its checkpoint has.

    progress: called with (layers done, layers in all).
    Returns Scores with spectral_norm, frobenius_norm, stable_rank and their per-head twins, bias_norm and k_norm gains
    where there are any, and the inventory that was taken on the way.
    Raises ModelError, UnknownLayout and NonFiniteWeight as `models.weights` does.
    """
    config = load_config(source)
    inventory = take_inventory(config, source.id)
    place = source.fetch(weights=True)
    checkpoint = open_checkpoint(place, config.get_text_config(decoder=True))
    gain_offset = 0.0 if place.is_file() else inventory.key_norm_offset or 0.0  # llama.cpp stores whole gains
    fingerprint = Fingerprint()
    layers = []
    for weights in stream_projections(checkpoint, inventory.geometry, config.get_text_config(decoder=True)):
        fingerprint.add(weights)
        layers.append(layer_norms(weights, gain_offset))
        progress(len(layers), len(inventory.geometry.scored))
    scores = Scores(
        source="norms",
        kvprof_version=__version__,
        model=inventory.model.model_copy(update={"fingerprint": fingerprint.text}),
        geometry=inventory.geometry,
        layers=tuple(layers),
    )
    return scores, inventory


def layer_norms(weights: LayerWeights, gain_offset: float = 0.0) -> LayerScores:
    """Measure one layer. gain_offset: what the norm after k_proj adds to its stored gains (1 in Gemma)."""
    layer = weights.layer
    gains = None if weights.key_gain is None else weights.key_gain.double() + gain_offset
    key = _tensor_norms(weights.key, layer.kv_heads) | {
        "bias_norm": _length(weights.key_bias),
        "gain_rms": None if gains is None else float(gains.square().mean().sqrt()),
        "gain_max": None if gains is None else float(gains.abs().max()),
    }
    value = _tensor_norms(weights.value, layer.kv_heads) | {"bias_norm": _length(weights.value_bias)}
    return LayerScores(layer=layer.layer, key=TensorScores(**key), value=TensorScores(**value))


def spectral_norm(weight: Tensor) -> float:
    """Largest singular value of a projection matrix.

    weight: (out_features, in_features), any float dtype; computed in float64 from the smaller Gram matrix.
    Returns the norm, in the weight's own units; relative error below 1e-6.
    Raises ValueError if any entry is NaN or infinite.
    Source: arXiv 2502.15075, section 3.
    """
    gram, scale = _gram(weight if weight.shape[0] <= weight.shape[1] else weight.T)
    return scale * math.sqrt(largest_eigenvalue(gram))


def frobenius_norm(weight: Tensor) -> float:
    """Root of the sum of squares of a matrix, any float dtype, computed in float64 without overflow or underflow.

    Raises ValueError if any entry is NaN or infinite.
    """
    scale = _largest_entry(weight)
    blocks = torch.split(weight, _chunk(weight.shape[1])) if scale else ()
    return scale * math.sqrt(sum(float((block.double() / scale).square().sum()) for block in blocks))


def largest_eigenvalue(gram: Tensor) -> float:
    """Largest eigenvalue of a symmetric positive semidefinite matrix, float64.

    Lanczos with full reorthogonalisation from a fixed random start, until the residual bounds the relative error by
    1e-9; every eigenvalue by LAPACK for a small matrix or one on which Lanczos has not settled.
    """
    size = len(gram)
    if size <= _SMALL:
        return max(0.0, float(np.linalg.eigvalsh(gram.numpy())[-1])) if size else 0.0
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.empty(min(_STEPS, size) + 1, size, dtype=torch.float64)
    basis[0] = start / start.norm()
    tridiagonal = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    for step in range(len(basis) - 1):
        image = gram @ basis[step]
        tridiagonal[step, step] = image @ basis[step]
        for _ in range(2):  # the second pass removes what rounding left of the first
            image -= basis[: step + 1].T @ (basis[: step + 1] @ image)
        residual = float(image.norm())
        if step % 8 == 7 or residual <= _TOLERANCE * float(tridiagonal[0, 0]):
            values, vectors = torch.linalg.eigh(tridiagonal[: step + 1, : step + 1])
            if residual * abs(float(vectors[-1, -1])) <= _TOLERANCE * float(values[-1]):
                return max(0.0, float(values[-1]))
        tridiagonal[step, step + 1] = tridiagonal[step + 1, step] = residual
        basis[step + 1] = image / residual
    return max(0.0, float(torch.linalg.eigvalsh(gram)[-1]))


def _tensor_norms(weight: Tensor, heads: int) -> dict[str, float | tuple[float, ...] | None]:
    """Norms of one matrix and of each head's rows, all from one Gram matrix where it is the smaller one."""
    if weight.shape[0] <= weight.shape[1]:
        gram, scale = _gram(weight)
        size = len(gram) // heads
        blocks = [gram[head * size : (head + 1) * size, head * size : (head + 1) * size] for head in range(heads)]
        spectral = scale * math.sqrt(largest_eigenvalue(gram))
        frobenius = scale * math.sqrt(float(gram.trace()))
        head_spectral = tuple(scale * math.sqrt(largest_eigenvalue(block)) for block in blocks)
        head_frobenius = tuple(scale * math.sqrt(float(block.trace())) for block in blocks)
    else:
        spectral, frobenius = spectral_norm(weight), frobenius_norm(weight)
        head_spectral = tuple(spectral_norm(rows) for rows in weight.chunk(heads))
        head_frobenius = tuple(frobenius_norm(rows) for rows in weight.chunk(heads))
    return {
        "spectral_norm": spectral,
        "frobenius_norm": frobenius,
        "stable_rank": (frobenius / spectral) ** 2 if spectral else 0.0,
        "head_spectral_norm": head_spectral,
        "head_frobenius_norm": head_frobenius,
    }


def _gram(weight: Tensor) -> tuple[Tensor, float]:
    """Return (W / s)(W / s)^T in float64 and the scale s, the largest entry: squares neither overflow nor vanish.

    The columns are converted a few at a time, so that W never stands in memory as float64.
    """
    rows = weight.shape[0]
    gram = torch.zeros(rows, rows, dtype=torch.float64)
    scale = _largest_entry(weight)
    if scale == 0.0:
        return gram, 0.0
    for block in torch.split(weight, _chunk(rows), dim=1):
        block = block.double() / scale
        gram.addmm_(block, block.T)
    return gram, scale


def _largest_entry(weight: Tensor) -> float:
    """Largest absolute value of a matrix, 0 for an empty one; raises ValueError for NaN or infinity."""
    low, high = (float(end) for end in weight.aminmax()) if weight.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("a matrix with NaN or infinite entries has no norm")
    return max(-low, high)


def _chunk(length: int) -> int:
    """How many rows (or columns) of this length stand in memory as float64 at a time."""
    return max(256, _CHUNK_BYTES // (8 * max(1, length)))


def _length(bias: Tensor | None) -> float | None:
    return None if bias is None else float(bias.double().norm())
