"""Weights of MLX: integers of 2 to 8 bits with a scale and a bias a group (affine), and its 4- and 8-bit floats.

The reference is `mlx.core.dequantize`, which computes in the dtype of the scales, or in bfloat16 where those are
bytes. The config says bits and group size, for all matrices and for some by name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvprof.models.quantized.matrix import CodedMatrix, Parts, Settings, text, whole_number
from kvprof.models.quantized.scales import exponents, scaled, unpacked, unpacked_float4

_BITS = (2, 3, 4, 5, 6, 8)
_SCALES = ("float16", "bfloat16", "float32")
_LARGEST_GROUP = 4096
_FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Modes whose codes are floats: bits, and columns that share a scale of a byte."""


def mlx_matrix(parts: Parts, settings: Settings) -> CodedMatrix | None:
    """Return how a matrix of MLX's is read; None for another. Raises ModelError for parts that do not fit."""
    if parts.dtype("weight") != "uint32":
        return None
    rows, words = parts.need("weight", "uint32", dimensions=2)
    if "scales" not in parts:
        raise parts.wrong(f"{parts.name('weight')} is quantized to uint32, and no scales stand beside it")
    own = settings.get(parts.module)
    stated = {**settings, **own} if isinstance(own, Mapping) else settings
    mode = stated.get("mode", "affine")
    if not isinstance(mode, str) or mode not in ("affine", *_FLOATS):
        raise parts.wrong(f"its mode is {mode!r:.40}")
    usual = _FLOATS.get(mode, (4, 64))
    bits = whole_number(stated.get("bits", usual[0]), 1, 8)
    group = whole_number(stated.get("group_size", usual[1]), 1, _LARGEST_GROUP)
    if bits not in _BITS or group is None or (mode in _FLOATS and (bits, group) != usual):
        raise parts.wrong(
            f"the config says {stated.get('bits')!r:.20} bits in groups of {stated.get('group_size')!r:.20}"
        )
    columns = words * 32 // bits
    shape = (rows, columns)
    grid = (rows, columns // group)
    if words * 32 % bits or columns % group or parts.need("scales", *_SCALES, "uint8", dimensions=2) != grid:
        raise parts.wrong(
            f"{parts.name('weight')} is {text((rows, words))} and its scales {text(parts.shape('scales'))}, which make "
            f"no matrix of {bits} bits in groups of {group}"
        )
    if mode in _FLOATS:
        return _floats(parts, shape, mode)
    return _affine(parts, shape, bits, group)


def _affine(parts: Parts, shape: tuple[int, int], bits: int, group: int) -> CodedMatrix:
    leaf = "biases" if "biases" in parts else "qbiases"  # the latter where transformers wrote it
    grid = parts.need("scales", *_SCALES)
    if parts.need(leaf, *_SCALES) != grid:
        raise parts.wrong(f"{parts.name(leaf)} is {text(parts.shape(leaf))}, its scales {text(grid)}")

    def decode() -> Tensor:
        scales, biases = parts.read("scales"), parts.read(leaf)
        codes = unpacked(parts.read("weight"), bits, shape[1])
        product = scaled(codes, scales, (1, group)).view(*grid, group)
        return (product + biases.unsqueeze(-1)).reshape(shape)

    dtype: torch.dtype = getattr(torch, parts.dtype("scales"))
    kind = f"MLX, {bits}-bit integers, a scale and a bias for {group} columns"
    return CodedMatrix(kind, shape, dtype, parts.names("weight", "scales", leaf), decode)


def _floats(parts: Parts, shape: tuple[int, int], mode: str) -> CodedMatrix:
    parts.need("scales", "uint8")
    bits, group = _FLOATS[mode]

    def decode() -> Tensor:
        packed, stored = parts.read("weight").view(torch.uint8), parts.read("scales")
        codes = unpacked_float4(packed, torch.float32) if bits == 4 else packed.view(torch.float8_e4m3fn)
        scales = stored.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else exponents(stored).float()
        return scaled(codes, scales, (1, group)).bfloat16()

    kind = f"MLX, {mode.upper()}, a scale for {group} columns"
    return CodedMatrix(kind, shape, torch.bfloat16, parts.names("weight", "scales"), decode)
