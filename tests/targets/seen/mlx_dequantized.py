"""Writes what MLX gives back of a few tokens; run where `mlx[cpu]` is installed, see tests/targets/run.sh.

python tests/targets/seen/mlx_dequantized.py tests/data/runtimes/mlx_dequantized.npz
"""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np

BITS_AND_GROUPS = [(bits, 64) for bits in (2, 3, 4, 5, 6, 8)] + [(4, 32), (6, 128)]


def tokens() -> np.ndarray:
    """Return tokens of 128 channels that float16 and bfloat16 hold exactly, some of them awkward."""
    generator = np.random.default_rng(7)
    rows = generator.standard_normal((4, 128)) * np.exp2(generator.integers(-3, 4, (4, 1)))
    rows[0, :32] += 9
    rows[1] = np.abs(rows[1])
    rows[2, 5] = 40
    rows[3, 64:] = 1.25
    for dtype in (mx.bfloat16, mx.float16):
        rows = np.array(mx.array(rows.astype(np.float32)).astype(dtype).astype(mx.float32))
    return rows


def main() -> None:
    rows = tokens()
    found = {"mlx": np.array(mx.__version__), "tokens": rows}
    for name in ("float16", "bfloat16", "float32"):
        dtype = getattr(mx, name)
        for bits, group_size in BITS_AND_GROUPS:
            codes = mx.quantize(mx.array(rows).astype(dtype), group_size=group_size, bits=bits)
            assert codes[1].dtype == codes[2].dtype == dtype
            restored = mx.dequantize(*codes, group_size=group_size, bits=bits)
            # What attention multiplies with, one channel after another.
            product = mx.quantized_matmul(mx.eye(128).astype(dtype), *codes, group_size=group_size, bits=bits)
            assert mx.array_equal(product.T, restored)
            found[f"{name} {bits} {group_size}"] = np.array(restored.astype(mx.float32))
    np.savez_compressed(sys.argv[1], **found)


main()
