"""Weights of the compressed-tensors library: integers, FP8, MXFP8, and codes packed into words or bytes.

Of each matrix the tensors themselves say how it is stored, so that no pattern of a config is matched: the number of
bits by the packed width, the groups by the scales' shape. Numbers are computed in the scales' dtype, as the library
does (`dequantize` in quantization/lifecycle/forward.py of compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kvprof.models.quantized.fp8 import FLOAT8, scale_text, stated_block
from kvprof.models.quantized.matrix import CodedMatrix, Parts, Settings, text, whole_number
from kvprof.models.quantized.scales import block_of, exponents, scaled, unpacked, unpacked_float4

_SCALE_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ROW_BLOCK = 1
_MXFP4_GROUP, _NVFP4_GROUP = 32, 16


def compressed_matrix(parts: Parts, settings: Settings) -> CodedMatrix | None:
    """Return how a matrix of this library's is read; None for another. Raises ModelError for parts that do not fit."""
    if parts.dtype("weight_packed") == "int32":
        return _packed_integers(parts, settings)
    if "weight_packed" in parts:
        return _packed_float4(parts)
    is_own = settings.get("quant_method") in ("compressed-tensors", "compressed_tensors") and "weight_scale" in parts
    if parts.dtype("weight") == "int8" and "weight_scale" in parts:
        return _integers(parts, settings)
    return _float8(parts, settings) if is_own and parts.dtype("weight") in FLOAT8 else None


def _integers(parts: Parts, settings: Settings) -> CodedMatrix:
    """Integers of 8 bits or fewer, one a byte (`int-quantized`)."""
    shape = _matrix_shape(parts.need("weight", "int8", dimensions=2))
    block = _block(parts, settings, shape)
    zero = "weight_zero_point"
    if zero in parts and parts.need(zero, "int8", "uint8", "int32", "int64") != parts.shape("weight_scale"):
        raise parts.wrong(f"{parts.name(zero)} is {text(parts.shape(zero))}, its scales {text(_scales(parts))}")

    def decode() -> Tensor:
        zeros = parts.read(zero) if zero in parts else None
        return _scaled(parts.read("weight"), parts.read("weight_scale"), zeros, block)

    return _coded(parts, f"int8, {scale_text(block, shape)}", shape, ("weight", "weight_scale", zero), decode)


def _float8(parts: Parts, settings: Settings) -> CodedMatrix:
    """FP8 (`float-quantized`), whose scales are exponents where it is MXFP8."""
    shape = _matrix_shape(parts.need("weight", *FLOAT8, dimensions=2))
    is_exponent = parts.dtype("weight_scale") == "uint8"
    block = _block(parts, settings, shape, *(("uint8",) if is_exponent else _SCALE_DTYPES))

    def decode() -> Tensor:
        scales = parts.read("weight_scale")
        return scaled(parts.read("weight"), exponents(scales) if is_exponent else scales, block)

    kind = f"{'MXFP8' if is_exponent else 'FP8'}, {scale_text(block, shape)} (weight_scale)"
    return _coded(parts, kind, shape, ("weight", "weight_scale"), decode, torch.bfloat16 if is_exponent else None)


def _packed_integers(parts: Parts, settings: Settings) -> CodedMatrix:
    """Integers packed into 32-bit words without gaps, 2^(bits - 1) above their value (`pack-quantized`)."""
    rows, words = _matrix_shape(parts.need("weight_packed", "int32", dimensions=2))
    if parts.need("weight_shape", "int64", "int32") != (2,):
        raise parts.wrong(f"{parts.name('weight_shape')} is {text(parts.shape('weight_shape'))}, not two numbers")
    told, columns = parts.read("weight_shape").tolist()
    bits = _bits(columns, words, settings)
    if told != rows or bits is None:
        raise parts.wrong(
            f"{parts.name('weight_packed')} is {text((rows, words))}, which cannot hold a weight of {told}x{columns}"
        )
    shape = (rows, columns)
    block = _block(parts, settings, shape)
    groups = columns // block[1]
    zero, order = "weight_zero_point", "weight_g_idx"
    is_packed = parts.dtype(zero) == "int32" and block[0] == 1
    zeros_shape = _packed_shape(rows, groups, bits) if is_packed else _scales(parts)
    if zero in parts and parts.need(zero, "int32" if is_packed else "int8") != zeros_shape:
        raise parts.wrong(f"{parts.name(zero)} is {text(parts.shape(zero))}, its scales {text(_scales(parts))}")
    if order in parts and parts.need(order, "int32", "int64") != (columns,):
        raise parts.wrong(f"{parts.name(order)} is {text(parts.shape(order))}, and there are {columns} columns")

    def decode() -> Tensor:
        offset = 1 << (bits - 1)
        codes = unpacked(parts.read("weight_packed"), bits, columns) - offset
        zeros = parts.read(zero) if zero in parts else None
        if zeros is not None and is_packed:
            zeros = unpacked(zeros.T.contiguous(), bits, rows).T - offset
        scales = parts.read("weight_scale").reshape(-1, groups)
        zeros = None if zeros is None else zeros.reshape(-1, groups)
        group = parts.read(order).long() if order in parts else None
        if group is None or bool((group < 0).any()):  # not reordered, says the library
            return _scaled(codes, scales, zeros, block)
        if int(group.max()) >= groups:
            raise parts.wrong(f"{parts.name(order)} names group {int(group.max())} of {groups}")
        return _scaled(codes, scales[:, group], None if zeros is None else zeros[:, group], (block[0], 1))

    leaves = ("weight_packed", "weight_scale", zero, order, "weight_shape")
    return _coded(parts, f"{bits}-bit integers, {scale_text(block, shape)}", shape, leaves, decode)


def _packed_float4(parts: Parts) -> CodedMatrix:
    """4-bit floats: MXFP4, whose scales are exponents, or NVFP4, whose FP8 scales a number of the matrix divides."""
    rows, packed = _matrix_shape(parts.need("weight_packed", "uint8", dimensions=2))
    is_exponent = parts.dtype("weight_scale") == "uint8"
    group = _MXFP4_GROUP if is_exponent else _NVFP4_GROUP
    shape = (rows, 2 * packed)
    if parts.need("weight_scale", "uint8" if is_exponent else "float8_e4m3fn") != (rows, shape[1] // group):
        raise parts.wrong(
            f"{parts.name('weight_scale')} is {text(parts.shape('weight_scale'))}, which does not lie over a weight of "
            f"{text(shape)} in groups of {group}"
        )
    whole = "weight_global_scale"
    if not is_exponent and parts.need(whole, "float32") not in ((), (1,), (1, 1)):
        raise parts.wrong(f"{parts.name(whole)} is {text(parts.shape(whole))}, not one number")

    def decode() -> Tensor:
        codes = unpacked_float4(parts.read("weight_packed"), torch.bfloat16)
        if is_exponent:
            return scaled(codes, exponents(parts.read("weight_scale")), (_ROW_BLOCK, group))
        # In float32, and rounded once; a scale of NaN shows in what it scales.
        scales = parts.read("weight_scale").float() / parts.read(whole).reshape(1)
        return scaled(codes, scales, (_ROW_BLOCK, group)).bfloat16()

    kind = f"{'MXFP4' if is_exponent else 'NVFP4'}, a scale for {group} columns"
    leaves = ("weight_packed", "weight_scale", *(() if is_exponent else (whole,)))
    return _coded(parts, kind, shape, leaves, decode, torch.bfloat16)


def _coded(
    parts: Parts,
    kind: str,
    shape: tuple[int, int],
    leaves: tuple[str, ...],
    decode: object,
    dtype: torch.dtype | None = None,
) -> CodedMatrix:
    own: torch.dtype = dtype or getattr(torch, parts.dtype("weight_scale"))
    return CodedMatrix(f"compressed-tensors, {kind}", shape, own, parts.names(*leaves), decode)  # type: ignore[arg-type]


def _scaled(codes: Tensor, scales: Tensor, zeros: Tensor | None, block: tuple[int, int]) -> Tensor:
    """Return (codes - zeros) times scales, both rounded to the scales' dtype."""
    values = codes.to(scales.dtype)
    if zeros is not None:
        values = values - scaled(torch.ones_like(values), zeros.to(scales.dtype), block)
    return scaled(values, scales, block)


def _block(parts: Parts, settings: Settings, shape: tuple[int, int], *dtypes: str) -> tuple[int, int]:
    """Return the (rows, columns) that share a scale; raises ModelError where the scales do not lie over the matrix."""
    scales = parts.need("weight_scale", *(dtypes or _SCALE_DTYPES))
    named = (stated_block(args.get("block_structure")) for args in _weight_args(settings))
    stated = next((block for block in named if block is not None), None)
    block = block_of(shape, scales, stated)
    if block is None or (block != stated and 1 < block[0] < shape[0]):
        raise parts.wrong(
            f"{parts.name('weight_scale')} is {text(scales)}, which does not lie over a weight of {text(shape)}"
        )
    return block


def _scales(parts: Parts) -> tuple[int, ...]:
    return parts.shape("weight_scale")


def _bits(columns: int, words: int, settings: Settings) -> int | None:
    """Return the width of codes of which so many columns fill so many words; None where none does, or several."""
    fitting = {bits for bits in range(1, 9) if columns > 0 and -(-columns * bits // 32) == words}
    stated = {whole_number(args.get("num_bits"), 1, 8) for args in _weight_args(settings)}
    found = fitting & stated if len(fitting) > 1 else fitting
    return next(iter(found)) if len(found) == 1 else None


def _packed_shape(rows: int, groups: int, bits: int) -> tuple[int, int]:
    """Return the shape of zero points packed down their columns."""
    return -(-rows * bits // 32), groups


def _weight_args(settings: Settings) -> Iterator[Mapping[str, object]]:
    """Yield what each group of a config says of its weights."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(args := group.get("weights"), Mapping):
            yield args


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]
