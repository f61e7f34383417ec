"""GPTQ and AWQ weights: 4-bit and other integers in 32-bit words, (in_features, out_features), with zero points.

Both store `qweight`, `qzeros` and `scales`; GPTQ packs inputs and names each input's group in `g_idx`, AWQ packs
outputs in an order of its own. Which of them it is, and how many bits, follows from the shapes. The references are
`dequantize_weight` of GPTQModel's TorchLinear and `dequantize_gemm` of AutoAWQ: in the scales' dtype, both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvprof.models.quantized.matrix import CodedMatrix, Parts, Settings, text, whole_number
from kvprof.models.quantized.scales import unpacked

_BITS = (2, 3, 4, 8)
_AWQ_BITS = (4,)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the eight codes of a word of AWQ stand in it, of outputs in order."""
_SCALES = ("float16", "bfloat16", "float32")
_V2 = ("gptq_v2",)
_PLANAR = ("gptq_p",)


def gptq_matrix(parts: Parts, settings: Settings) -> CodedMatrix | None:
    """Return how a GPTQ or AWQ matrix is read; None for another. Raises ModelError for parts that do not fit."""
    if "qweight" not in parts:
        return None
    rows, columns = _pair(parts.need("qweight", "int32", dimensions=2))
    groups, outputs = _pair(parts.need("scales", *_SCALES, dimensions=2))
    zeros = _pair(parts.need("qzeros", "int32", dimensions=2))
    bits = next((width for width in _BITS if zeros == (groups, outputs * width // 32)), None)
    if bits is None or outputs * bits % 32:
        raise parts.wrong(
            f"{parts.name('qzeros')} is {text(zeros)}, which holds no zero points of {' or '.join(map(str, _BITS))} "
            f"bits for scales of {text((groups, outputs))}"
        )
    if columns == outputs:
        return _gptq(parts, settings, bits, rows * 32 // bits, groups)
    if bits in _AWQ_BITS and columns * 32 == outputs * bits:
        size = whole_number(settings.get("group_size"), 1, rows)
        if size is not None and size * groups != rows:
            raise parts.wrong(f"{rows} inputs are not {groups} groups of {size}, which the config says")
        return _awq(parts, rows, groups, outputs)
    raise parts.wrong(
        f"{parts.name('qweight')} is {text((rows, columns))}, and its scales {text((groups, outputs))}: neither GPTQ's "
        "layout nor AWQ's (gemm)"
    )


def _gptq(parts: Parts, settings: Settings, bits: int, inputs: int, groups: int) -> CodedMatrix:
    shape = (parts.shape("scales")[1], inputs)
    form = settings.get("checkpoint_format") or settings.get("format")
    if form in _PLANAR:
        raise parts.wrong(f"its checkpoint_format is {form}")
    order = "g_idx"
    if order in parts and parts.need(order, "int32", "int64") != (inputs,):
        raise parts.wrong(f"{parts.name(order)} is {text(parts.shape(order))}, and there are {inputs} inputs")
    if order not in parts and inputs % groups:
        raise parts.wrong(f"{inputs} inputs in {groups} groups, and no {parts.name(order)} to say which is in which")
    is_v1 = form not in _V2

    def decode() -> Tensor:
        scales = parts.read("scales")
        zeros = _zero_points(parts.read("qzeros"), bits, shape[0], is_v1)
        codes = unpacked(parts.read("qweight").T.contiguous(), bits, inputs)
        group = parts.read(order).long() if order in parts else torch.arange(inputs) // (inputs // groups)
        if not bool(((group >= 0) & (group < groups)).all()):
            raise parts.wrong(f"{parts.name(order)} names groups outside of {groups}")
        return scales.T[:, group] * (codes - zeros.T[:, group]).to(scales.dtype)

    kind = f"GPTQ, {bits}-bit integers, a scale for {inputs / groups:g} columns"
    return _matrix(parts, kind, shape, decode)


def _zero_points(words: Tensor, bits: int, count: int, is_v1: bool) -> Tensor:
    """Return the zero points; version 1 stores them less one, each word at a time where its codes end with it."""
    if not is_v1:
        return unpacked(words, bits, count)
    if 32 % bits:
        return (unpacked(words, bits, count) + 1) & ((1 << bits) - 1)
    ones = sum(1 << place for place in range(0, 32, bits))
    return unpacked(((words.long() + ones) & (2**32 - 1)).to(torch.uint32), bits, count)


def _awq(parts: Parts, inputs: int, groups: int, outputs: int) -> CodedMatrix:
    shape = (outputs, inputs)
    if inputs % groups:
        raise parts.wrong(f"{inputs} inputs do not divide into {groups} groups")
    size = inputs // groups

    def in_order(words: Tensor) -> Tensor:
        codes = unpacked(words, 4, outputs).reshape(len(words), -1, 8)
        return codes[:, :, list(_AWQ_ORDER)].reshape(len(words), outputs)

    def decode() -> Tensor:
        scales = parts.read("scales")
        zeros = in_order(parts.read("qzeros")).repeat_interleave(size, dim=0)
        values = (in_order(parts.read("qweight")) - zeros).to(scales.dtype)
        return (values * scales.repeat_interleave(size, dim=0)).T.contiguous()

    return _matrix(parts, f"AWQ, 4-bit integers, a scale for {size} columns", shape, decode)


def _matrix(parts: Parts, kind: str, shape: tuple[int, int], decode: object) -> CodedMatrix:
    dtype: torch.dtype = getattr(torch, parts.dtype("scales"))
    names = parts.names("qweight", "qzeros", "scales", "g_idx")
    return CodedMatrix(kind, shape, dtype, names, decode)  # type: ignore[arg-type]


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]
