"""Weights of bitsandbytes: nf4 and fp4 in blocks along the rows, 8-bit integers with a scale a row.

The references are `dequantize_4bit`, in float32 and rounded once to the dtype that was quantized from, and
`int8_vectorwise_dequant`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kvprof.models.quantized.matrix import CodedMatrix, Parts, Settings, text, whole_number

_KINDS = ("nf4", "fp4")
_LONGEST_STATE_BYTES = 2**16
_DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_BLOCK = 4096
_WIDEST = 2**31

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
"""Of fp4, twelve times what a code stands for; both zeros are positive."""

_INT8_SCALE = 7.874015718698502e-3
"""One in 127, as the library multiplies by it."""


def bitsandbytes_matrix(parts: Parts, settings: Settings) -> CodedMatrix | None:
    """Return how a matrix of this library's is read; None for another. Raises ModelError for parts that do not fit."""
    kind = next((name for name in _KINDS if f"weight.quant_state.bitsandbytes__{name}" in parts), None)
    if kind is not None:
        return _four_bits(parts, kind)
    return _eight_bits(parts) if parts.dtype("weight") == "int8" and "SCB" in parts else None


def _eight_bits(parts: Parts) -> CodedMatrix:
    rows, columns = parts.need("weight", "int8", dimensions=2)
    if parts.need("SCB", "float32") != (rows,):
        raise parts.wrong(f"{parts.name('SCB')} is {text(parts.shape('SCB'))}, and the weight has {rows} rows")

    def decode() -> Tensor:
        return parts.read("weight") * parts.read("SCB").view(-1, 1) * _INT8_SCALE

    kind = "bitsandbytes, int8, a scale a row"
    return CodedMatrix(kind, (rows, columns), torch.float32, parts.names("weight", "SCB"), decode)


def _four_bits(parts: Parts, kind: str) -> CodedMatrix:
    state = _state(parts, f"weight.quant_state.bitsandbytes__{kind}")
    shape, block = _shape(parts, state), whole_number(state.get("blocksize"), 1, _LARGEST_BLOCK)
    dtype = state.get("dtype")
    if block is None or dtype not in _DTYPES or state.get("quant_type") != kind:
        raise parts.wrong(f"its quant_state says blocksize {block}, dtype {dtype!r:.40}")
    count = math.prod(shape)
    if math.prod(parts.need("weight", "uint8")) != -(-count // 2):
        raise parts.wrong(f"{parts.name('weight')} is {text(parts.shape('weight'))} bytes, its matrix {text(shape)}")
    _check_scales(parts, state, -(-count // block))

    def decode() -> Tensor:
        packed = parts.read("weight").reshape(-1)
        codes = torch.stack((packed >> 4, packed & 0xF), dim=-1).reshape(-1)[:count]
        values = _table(kind)[codes.int()]
        # What fills the last block is left out again.
        padded = torch.nn.functional.pad(values, (0, -count % block)).view(-1, block)
        scaled = (padded * _scales(parts, state).view(-1, 1)).reshape(-1)[:count]
        return scaled.reshape(shape).to(getattr(torch, dtype))

    leaves = ("weight", *_SCALE_LEAVES, f"weight.quant_state.bitsandbytes__{kind}")
    said = f"bitsandbytes, {kind}, a scale for {block} numbers"
    return CodedMatrix(said, shape, getattr(torch, dtype), parts.names(*leaves), decode)


_SCALE_LEAVES = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")


def _table(kind: str) -> Tensor:
    return torch.tensor(_NF4) if kind == "nf4" else torch.tensor(_FP4) / 12


def _state(parts: Parts, leaf: str) -> Mapping[str, object]:
    """Read what the library keeps beside a weight as JSON in bytes; raises ModelError where it is none."""
    shape = parts.need(leaf, "uint8")
    if len(shape) != 1 or shape[0] > _LONGEST_STATE_BYTES:
        raise parts.wrong(f"{parts.name(leaf)} is {text(shape)}, no text of at most {_LONGEST_STATE_BYTES} bytes")
    try:
        state = json.loads(bytes(parts.read(leaf).numpy()).decode())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, Mapping):
        raise parts.wrong(f"{parts.name(leaf)} is no JSON object")
    return state


def _shape(parts: Parts, state: Mapping[str, object]) -> tuple[int, int]:
    told = state.get("shape")
    sizes = [whole_number(size, 1, _WIDEST) for size in told] if isinstance(told, list) else []
    if len(sizes) != 2 or sizes[0] is None or sizes[1] is None:
        raise parts.wrong(f"its quant_state says shape {told!r:.40}")
    return sizes[0], sizes[1]


def _check_scales(parts: Parts, state: Mapping[str, object], blocks: int) -> None:
    """Raise ModelError unless there is a scale for each block, quantized themselves where the state says so."""
    is_nested = "weight.nested_absmax" in parts
    if parts.need("weight.absmax", "uint8" if is_nested else "float32") != (blocks,):
        raise parts.wrong(f"{parts.name('weight.absmax')} is {text(parts.shape('weight.absmax'))}, not {blocks} scales")
    if not is_nested:
        return
    size = whole_number(state.get("nested_blocksize"), 1, _LARGEST_BLOCK)
    offset = state.get("nested_offset")
    if size is None or type(offset) not in (int, float) or not math.isfinite(offset):  # type: ignore[arg-type]
        raise parts.wrong(f"its quant_state says nested_blocksize {size}, nested_offset {offset!r:.40}")
    needed = {"weight.nested_absmax": -(-blocks // size), "weight.nested_quant_map": 256}
    for leaf, count in needed.items():
        if parts.need(leaf, "float32") != (count,):
            raise parts.wrong(f"{parts.name(leaf)} is {text(parts.shape(leaf))}, not {count} numbers")


def _scales(parts: Parts, state: Mapping[str, object]) -> Tensor:
    """Return the scale of each block, float32."""
    stored = parts.read("weight.absmax")
    if "weight.nested_absmax" not in parts:
        return stored
    size, offset = state["nested_blocksize"], state["nested_offset"]
    assert isinstance(size, int)
    table, scales = parts.read("weight.nested_quant_map"), parts.read("weight.nested_absmax")
    return table[stored.int()] * scales.repeat_interleave(size)[: len(stored)] + torch.tensor(float(offset))  # type: ignore[arg-type]
