"""The norms of a matrix: spectral, Frobenius, and those of each head's rows, exact to 1e-6 for any float dtype.

Works on tensors, a few columns in float64 at a time. Does not know which matrices they are.
Source: arXiv 2502.15075, section 3.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_SMALL = 256
"""Below this size all eigenvalues cost less than a Lanczos run."""
_STEPS = 300
_TOLERANCE = 1e-9
CHUNK_BYTES = 16 * 2**20


def matrix_norms(weight: Tensor, heads: int) -> dict[str, float | tuple[float, ...] | None]:
    """Return the norms and the stable rank of a matrix and the norms of each head's rows, by their names in Scores.

    All come from one Gram matrix, where that is the smaller one. Raises ValueError if any entry is NaN or infinite.
    """
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
    return max(256, CHUNK_BYTES // (8 * max(1, length)))
