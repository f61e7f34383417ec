"""FP8 weights: a float8 matrix and the scales that it is multiplied by, in float32.

One scale for all of it, one a row, or one a block; under the names that DeepSeek, FBGEMM, ModelOpt and Mistral give
them. The reference is `Fp8Dequantize` of transformers, which also finds blocks that the config does not name; blocks
that the matrix's edge cuts off are DeepSeek's own (`weight_dequant` in inference/kernel.py of DeepSeek-V3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvprof.errors import ModelError
from kvprof.models.quantized.matrix import CodedMatrix, Parts, Settings, text, whole_number
from kvprof.models.quantized.scales import SCALE_DTYPES, block_of, float_scales, scaled

FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"})
SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""Names of the scales beside `weight`; all of them are multiplied by, whatever they are called."""

_LARGEST_BLOCK = 2**20


def fp8_matrix(parts: Parts, settings: Settings) -> CodedMatrix | None:
    """Return how a float8 weight is read; None for another weight. Raises ModelError for scales that do not fit it."""
    if parts.dtype("weight") not in FLOAT8:
        return None
    shape = parts.need("weight", *FLOAT8, dimensions=2)
    leaf = next((name for name in SCALES if name in parts), None)
    if leaf is None:
        raise parts.wrong(_without_scale(parts.name("weight"), parts.dtype("weight")))
    grid = parts.need(leaf, *SCALE_DTYPES)
    block = block_of((shape[0], shape[1]), grid, stated_block(settings.get("weight_block_size")))
    if block is None:
        raise parts.wrong(f"{parts.name(leaf)} is {text(grid)}, which does not lie over a weight of {text(shape)}")

    def decode() -> Tensor:
        return scaled(parts.read("weight"), float_scales(parts.read(leaf)), block)

    kind = f"FP8, {scale_text(block, (shape[0], shape[1]))} ({leaf})"
    return CodedMatrix(kind, (shape[0], shape[1]), torch.float32, parts.names("weight", leaf), decode)


def check_scales(dtypes: Mapping[str, str]) -> None:
    """Raise ModelError for a float8 weight beside which no scale stands: transformers would load it without.

    dtypes: of all tensors of a checkpoint, by name.
    """
    for name, dtype in dtypes.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and dtype in FLOAT8 and not any(f"{module}.{scale}" in dtypes for scale in SCALES):
            raise ModelError(
                f"{_without_scale(name, dtype)}.\n"
                "  Download the checkpoint again, or name the one that it was quantized from."
            )


def _without_scale(name: str, dtype: object) -> str:
    return f"{name} is quantized to {dtype}, and no scale stands beside it ({' or '.join(SCALES[:2])})"


def stated_block(value: object) -> tuple[int, int] | None:
    """Return the (rows, columns) of a block that a config names; None where it names none that can be."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    rows, columns = (whole_number(size, 1, _LARGEST_BLOCK) for size in value)
    return None if rows is None or columns is None else (rows, columns)


def scale_text(block: tuple[int, int], shape: tuple[int, int]) -> str:
    """Say how many numbers share a scale."""
    if block == shape:
        return "one scale a matrix"
    if block == (1, shape[1]):
        return "a scale a row"
    if block[0] == 1:
        return f"a scale for {block[1]} columns"
    return f"a scale a block of {text(block)}"
