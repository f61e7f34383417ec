"""What the caches of other runtimes give back: a faithful fake quantizer of each of their formats.

Knows how each runtime rounds, from its public specification; stores no codes. Every format lies along a token's
channels: blocks within a head, so that what a token becomes depends on itself alone. Where a runtime would store a
scale of infinity, as most do where it is beyond float16, that is refused: no plan can be the better for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kvprof.errors import BeyondFormat
from kvprof.records.external_formats import EXTERNAL, ExternalFormat, Family
from kvprof.records.formats import Format
from kvprof.runtime.quantization.rotation import level_edges, lloyd_max_levels, rotation

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""`kvalues_iq4nl` of ggml-common.h."""
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float (OCP Microscaling Formats, 5.3.3)."""

LMDEPLOY_EDGES_AND_LEVELS = {
    2: ((-0.9815992, 0.0, 0.9815992), (-1.5104176, -0.4527808, 0.4527808, 1.5104176)),
    3: (
        (-1.7479274, -1.0499573, -0.5005497, 0.0, 0.5005497, 1.0499573, 1.7479274),
        (-2.1519456, -1.3439093, -0.7560052, -0.2450942, 0.2450942, 0.7560052, 1.3439093, 2.1519456),
    ),
}
"""`get_lloyd_max_codebook` of LMDeploy's turbo_quant.py (0.18.0): of a standard normal, ten steps towards Lloyd-Max."""


@torch.no_grad()
def fake_quantize_external(x_BHTD: Tensor, form: Format) -> Tensor:
    """Return what another runtime's cache gives back of keys or values: (B, H, T, D), in the dtype of `x_BHTD`.

    Computed in float32, as the runtimes do. form: its scheme names the format.
    Raises BeyondFormat for numbers that the runtime would give back as infinity, or as no number.
    """
    external = EXTERNAL[form.scheme]
    x = x_BHTD.float()
    blocks = x.reshape(*x.shape[:-1], -1, form.group_size)  # (B, H, T, blocks, channels of one)
    restored: Tensor = _ROUNDERS[external.family](blocks, external).reshape(x.shape)
    if not bool(restored.isfinite().all()):
        _refuse(x_BHTD, form.scheme)
    return restored.double() if x_BHTD.dtype == torch.float64 else _rounded_to(restored, x_BHTD.dtype)


def _refuse(x: Tensor, name: str) -> None:
    """Raise BeyondFormat for numbers of which not all came back finite."""
    if not bool(x.isfinite().all()):
        raise BeyondFormat(f"what is to be stored in {name} holds NaN or infinity: the model itself is out of range.")
    raise BeyondFormat(
        f"numbers as large as {float(x.abs().amax()):.4g} are beyond {name}: its scale cannot be as large (float16 "
        "ends at 65504), and its runtime would give back infinity.\n"
        "  Choose another format, or keep this layer's in 16 bits."
    )


def _ggml(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round to a type of ggml's, after what llama.cpp does to a head first (`build_attn` of its llama-graph.cpp)."""
    if not form.before:
        return _ggml_type(blocks, form.name, form.bits)
    assert form.word is not None
    heads = blocks.flatten(-2)
    size = heads.shape[-1]
    order = torch.arange(size, device=heads.device)
    if "gguf order" in form.before:
        order = order.view(2, -1).T.flatten()  # 0, D/2, 1, D/2 + 1 ...
    turned = heads[..., order]
    width = {"hadamard": size & -size, "hadamard 64": 64}.get(form.before[-1])
    if width is None:
        restored = _ggml_type(turned.reshape(blocks.shape), form.word, form.bits).flatten(-2)
    else:
        turn = rotation(width, None, heads.dtype, heads.device) / math.sqrt(width)
        parts = torch.unflatten(turned, -1, (-1, width)) @ turn
        rounded = _ggml_type(parts.reshape(blocks.shape), form.word, form.bits)
        restored = (rounded.reshape(parts.shape) @ turn).flatten(-2)
    return restored[..., order.argsort()].reshape(blocks.shape)


def _ggml_type(blocks: Tensor, name: str, bits: int) -> Tensor:
    """Round as `quantize_row_<type>_ref` of llama.cpp's ggml-quants.c does (q6_0: ik_llama.cpp's iqk_quantize.cpp)."""
    if name == "iq4_nl":
        return _iq4_nl(blocks)
    if name == "q8_0":
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return _half_away(blocks * _inverse(step)) * _float16(step)
    if name.endswith("_1"):
        return _from_minimum(blocks, bits)
    # Of the entry that is largest in magnitude the sign counts: its code is the lowest, which has no counterpart.
    half = 1 << (bits - 1)
    step = _largest(blocks) / -half
    codes = (blocks * _inverse(step) + (half + 0.5)).trunc().clamp(0, 2 * half - 1)
    return (codes - half) * _float16(step)


def _iq4_nl(blocks: Tensor) -> Tensor:
    """Round to the nearest of sixteen levels; the scale is then that of least squared error, weighted by x^2."""
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32, device=blocks.device)
    first = _largest(blocks) / levels[0]
    scaled = blocks * _inverse(first)
    upper = torch.searchsorted(levels, scaled.contiguous(), right=True).clamp(1, len(levels) - 1)
    below, above = levels[upper - 1], levels[upper]
    nearest = torch.where(scaled - below < above - scaled, below, above)
    weights = blocks.square()
    with_x = (weights * nearest * blocks).sum(-1, keepdim=True)
    with_itself = (weights * nearest.square()).sum(-1, keepdim=True)
    step = torch.where(with_itself > 0, with_x / with_itself, first)
    return nearest * _float16(step)


def _float8(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round to an 8-bit float, beyond its range to its largest number; the tensor's scale is 1."""
    dtype = torch.float8_e4m3fn if form.name == "fp8_e4m3" else torch.float8_e5m2
    return _rounded(blocks, dtype)


def _nvfp4(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round to e2m1 in units of an e4m3, the block's largest magnitude over 6; the tensor's scale is 1.

    Source: nvfp4_tensor.py of NVIDIA's Model-Optimizer, whose smallest scale is 2^-9. `nvfp4_4over6` tries the largest
    over 4 too and takes what errs less (vLLM 0.33.0, vllm/config/cache.py).
    """
    largest = blocks.abs().amax(-1, keepdim=True)
    tried = []
    for top in (6, 4) if form.name == "nvfp4_4over6" else (6,):
        step = _rounded((largest / top).clamp_min(2.0**-9), torch.float8_e4m3fn)
        tried.append(_e2m1(blocks / step) * step)
    errors = [(one - blocks).square().sum(-1, keepdim=True) for one in tried]
    return tried[0] if len(tried) == 1 else torch.where(errors[1] < errors[0], tried[1], tried[0])


def _fp4(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round to e2m1 in units of a power of two, the least that keeps the block within 6: SGLang's kvfp4_tensor.py.

    `fp4_mx_block16` is 0.5.23's: ties go up, and no scale is below 1e-10.
    """
    largest = blocks.abs().amax(-1, keepdim=True)
    if form.name == "fp4_mx_block16":
        step = torch.exp2((largest / 6).clamp_min(1e-10).log2().ceil())
        return _e2m1(blocks / step, ties="up") * step
    step = torch.exp2((largest / 6).log2().ceil().clamp(-127, 128)).masked_fill(largest == 0, 1.0)
    return _e2m1(blocks / step) * step


def _mxfp8(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round to e4m3 in units of a power of two: SGLang's mxfp8_quant_store_kv.py (0.5.23)."""
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    step = torch.exp2((largest / 448).log2().ceil().clamp(-127, 127))
    return _rounded(blocks / step, torch.float8_e4m3fn) * step


def _token_head(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round with one float32 scale for a head: vLLM's triton_reshape_and_cache_flash.py (0.33.0), 4 bits as `_int4`."""
    if form.bits == 4:
        return _int4_token_head(blocks)
    top = 127 if form.name.startswith("int8") else 448
    scale = (blocks.abs().amax(-1, keepdim=True) / top).clamp_min(1e-6)
    scaled = blocks * (1 / scale)
    return (_half_away(scaled) if top == 127 else _rounded(scaled, torch.float8_e4m3fn)) * scale


def _int4_token_head(blocks: Tensor) -> Tensor:
    """Rotate with random signs, then round with a scale and a zero point that takes its last four bits.

    Source: vLLM's int4_per_token_head.py (0.33.0). Heads that are no power of two are rotated in equal parts that are.
    """
    heads = blocks.shape[-1]
    size = heads & -heads  # the largest power of two that divides it
    signs = 2 * torch.bernoulli(torch.full((size,), 0.5), generator=torch.Generator().manual_seed(0x9E3779B9)) - 1
    turn = rotation(size, None, blocks.dtype, blocks.device) * signs.to(blocks)
    turned = (torch.unflatten(blocks, -1, (-1, size)) @ turn.T).flatten(-2)
    low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6)
    zero = _half_away(-low / scale).clamp(0, 15)
    codes = _half_away(turned * (1 / scale) + zero).clamp(0, 15)
    kept = (scale.view(torch.int32) & -16).view(torch.float32)
    restored: Tensor = (torch.unflatten((codes - zero) * kept, -1, (-1, size)) @ turn).flatten(-2) / size
    return restored


def _ultraquant(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round to e2m1 in units of a power of two near 0.156 of the largest: vLLM's ultraquant/reference.py (0.33.0)."""
    shape, heads = blocks.shape, blocks.flatten(-2)
    size = heads.shape[-1]
    turn = None if form.name == "ultraquant_v4" else rotation(size, None, heads.dtype, heads.device) / math.sqrt(size)
    parts = (heads if turn is None else heads @ turn).reshape(shape)
    largest = parts.abs().amax(-1, keepdim=True)
    step = torch.exp2(((largest * 0.156).log2() + 0.5).floor().clamp(-126, 127)).masked_fill(largest == 0, 1.0)
    restored = _e2m1(parts / step, ties="down") * step
    return restored if turn is None else (restored.flatten(-2) @ turn).reshape(shape)


def _e2m1(x: Tensor, ties: Literal["even", "up", "down"] = "even") -> Tensor:
    """Round to the nearest 4-bit float, beyond 6 to 6. ties: to the even code, to the larger number, or the smaller.

    Up is away from zero; down is towards minus infinity.
    """
    levels = torch.tensor(E2M1_LEVELS, dtype=torch.float32, device=x.device)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = x.abs().contiguous()
    below, above = (torch.searchsorted(middles, magnitude, right=right) for right in (False, True))
    taken = {
        "even": lambda: torch.where(above % 2 == 0, above, below),
        "up": lambda: above,
        "down": lambda: torch.where(x < 0, above, below),
    }[ties]()
    nearest: Tensor = levels[taken]
    return nearest.copysign(x)


def _mlx(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round as MLX's `affine_quantize` does on a CPU (0.32.4, mlx/backend/cpu/quantized.cpp).

    The end of the range that is larger in magnitude falls on a code exactly, and so does zero. Scale and bias are of
    the model's dtype, and so is what a code is restored with: `mx.dequantize` multiplies in it and then adds, as the
    CPU's products do and the GPU's of many queries.
    """
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    top = (1 << form.bits) - 1
    from_low = low.abs() > high.abs()
    scale = ((high - low) / top).clamp_min(1e-7)
    scale, edge = torch.where(from_low, scale, -scale), torch.where(from_low, low, high)
    steps = (edge / scale).round()
    bias = torch.where(steps != 0, edge, 0.0)
    scale = torch.where(steps != 0, edge / steps, scale)
    codes = ((blocks - bias) / scale).round().clamp(0, top)
    return _kept(_kept(codes * _kept(scale, form), form) + _kept(bias, form), form)


def _exl3(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Rotate 32 channels, and round to the middle of equal steps between plus and minus the largest.

    Source: ExLlamaV3's q_cache_kernels.cuh, as it is since its grid has midpoints; `compand_a` at its default of 0.
    """
    size = blocks.shape[-1]
    hadamard = rotation(size, None, blocks.dtype, blocks.device) / math.sqrt(size)
    turned = blocks @ hadamard
    half = 1 << (form.bits - 1)
    scale = turned.abs().amax(-1, keepdim=True) + 1e-10
    codes = (turned / scale * half + half).floor().clamp(0, 2 * half - 1)
    restored: Tensor = (codes - half + 0.5) / half * _float16(scale)
    return restored @ hadamard


def _lmdeploy(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round from the minimum of a head: LMDeploy's fill_kv_cache.py and pagedattention.py (0.18.0).

    Scale and zero point are of the model's dtype, and a code is restored in it: Triton rounds to it after every step.
    """
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    top = (1 << form.bits) - 1
    scale = (high - low) / top
    zero = -low * _inverse(scale)
    codes = (blocks * _inverse(scale) + zero + 0.5).trunc().clamp(0, top)
    restored = _kept(_kept(codes - _kept(zero, form), form) * _kept(scale, form), form)
    return torch.where(scale == 0, _kept(low, form), restored)


def _lmdeploy_turbo(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round a head's direction, turned by a Hadamard matrix, to levels: LMDeploy's turbo_quant.py (0.18.0).

    Keys have three bits of a level and one of the residual's sign, which the mean residual is then multiplied with.
    """
    size = blocks.shape[-1]
    hadamard = rotation(size, None, blocks.dtype, blocks.device) / math.sqrt(size)
    turned = blocks @ hadamard
    norm = (turned.square().sum(-1, keepdim=True) + 1e-8).sqrt()
    bits = 3 if form.bits == 4 else 2
    edges, levels = (
        torch.tensor(table, dtype=torch.float32, device=blocks.device) / math.sqrt(size)
        for table in LMDEPLOY_EDGES_AND_LEVELS[bits]
    )
    direction = (turned / norm).contiguous()
    found = levels[torch.searchsorted(edges, direction)]
    if form.bits == 4:
        residual = direction - found
        mean = ((residual.square().sum(-1, keepdim=True) + 1e-8) / size).sqrt()
        found = found + _kept(mean, form) * torch.where(residual >= 0, 1.0, -1.0)
    restored: Tensor = _kept(found * _kept(norm, form), form) @ hadamard
    return restored


def _turboquant(blocks: Tensor, form: ExternalFormat) -> Tensor:
    """Round as vLLM's TurboQuant (triton_turboquant_store.py): keys rotated to a codebook, values from their minimum.

    A key is its norm times a direction; what its codes stand for is brought to that norm (the `nc` of the dtypes). The
    rotation is a plain Hadamard matrix since pull request 40194 (0.33.0, turboquant_attn.py): without random signs, it
    gathers an offset that channels share in a few of its outputs.
    """
    if form.name.startswith("turbo_v"):
        return _from_minimum(blocks, form.bits)
    size = blocks.shape[-1]
    turn = rotation(size, None, blocks.dtype, blocks.device) / math.sqrt(size)
    norm = torch.linalg.vector_norm(blocks, dim=-1, keepdim=True)
    direction = blocks * _inverse(norm) @ turn.T * math.sqrt(size)  # about a standard normal
    edges, levels = (table(form.bits).to(blocks) for table in (level_edges, lloyd_max_levels))
    found = levels[torch.bucketize(direction.contiguous(), edges)]
    restored: Tensor = found / torch.linalg.vector_norm(found, dim=-1, keepdim=True) * _float16(norm)
    return restored @ turn


_ROUNDERS: dict[Family, Callable[[Tensor, ExternalFormat], Tensor]] = {
    "ggml": _ggml,
    "float8": _float8,
    "nvfp4": _nvfp4,
    "fp4": _fp4,
    "mxfp8": _mxfp8,
    "token_head": _token_head,
    "ultraquant": _ultraquant,
    "mlx": _mlx,
    "exl3": _exl3,
    "lmdeploy": _lmdeploy,
    "lmdeploy_turbo": _lmdeploy_turbo,
    "turboquant": _turboquant,
}


def _from_minimum(blocks: Tensor, bits: int) -> Tensor:
    """Round in equal steps from a block's minimum to its maximum; step and minimum are kept in float16."""
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    top = (1 << bits) - 1
    step = (high - low) / top
    codes = ((blocks - low) * _inverse(step) + 0.5).trunc().clamp(0, top)
    return codes * _float16(step) + _float16(low)


def _largest(blocks: Tensor) -> Tensor:
    """Return the entry of each block that is largest in magnitude, the first of equal ones, with its sign."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def _inverse(step: Tensor) -> Tensor:
    inverse = 1 / step
    return inverse.masked_fill(inverse.isinf(), 0.0)  # of a step that float16 will store as 0


def _kept(number: Tensor, form: ExternalFormat) -> Tensor:
    """Round to the dtype of the model, in which some formats keep numbers; beyond its range, to infinity."""
    assert form.of_dtype is not None
    dtype: torch.dtype = getattr(torch, form.of_dtype)
    return number.to(dtype).float()


def _float16(number: Tensor) -> Tensor:
    return number.half().float()


def _half_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves away from zero, as C's roundf."""
    whole = x.abs().floor()
    return (whole + (x.abs() - whole >= 0.5)).copysign(x)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _rounded_to(x, dtype).float()


def _rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a dtype; beyond its range, to its largest number."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)
