"""Keys and values -> codes, scales and zero points, and back. The one place where a cached number is rounded.

Knows the two schemes, `asymmetric` and `rotated`; other runtimes' are in external.py. Does not know layers, windows,
nor how codes are packed. What a token becomes depends on its own group alone: the same bits come out whatever is
encoded or decoded with it. What is too large to be stored comes back as the largest number that can be; what is no
finite number makes its whole group NaN, so that it shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprof.records.formats import Format
from kvprof.records.plan import Quantizer
from kvprof.runtime.quantization.external import fake_quantize_external
from kvprof.runtime.quantization.rotation import exact_levels, level_cells, lloyd_max_levels, rotation

CLIP_FRACTIONS = tuple(1.0 - 0.05 * step for step in range(9))
"""What `clip: mse` tries to shrink a group's range to: 1.0, 0.95 ... 0.6."""

USUAL = Quantizer()


@dataclass(frozen=True)
class Encoded:
    """Keys or values in codes. A unit is what is quantized at once: a group of tokens (axis `channel`), else a token.

    codes: (B, H, units, tokens a unit, D), uint8.
    scale, zero: (B, H, units, S): S is D for axis `channel`, the groups a head for axis `token`; `rotated` has no zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def fake_quantize(x_BHTD: Tensor, form: Format, quantizer: Quantizer = USUAL) -> Tensor:
    """Return what a cache that stores keys or values in this format gives back.

    x_BHTD: (B, H, T, D), any float dtype, which the result has too. Axis `channel`: T is a multiple of the group size,
    and groups start at the first token. Arithmetic is float32, of float64 tensors float64.
    quantizer: the dtypes of scale and zero, and the seed of the rotation. No gradient passes through the rounding.
    """
    if form.is_full:
        return x_BHTD
    if form.is_external:
        return fake_quantize_external(x_BHTD, form)
    return decode(encode(x_BHTD, form, quantizer), form, quantizer, torch.empty_like(x_BHTD))


@torch.no_grad()
def encode(x_BHTD: Tensor, form: Format, quantizer: Quantizer = USUAL) -> Encoded:
    """Return the codes of keys or values, (B, H, T, D), T a multiple of the tokens in a unit."""
    if form.scheme == "rotated":
        return _encode_rotated(x_BHTD, form, quantizer)
    units = torch.unflatten(x_BHTD.to(_arithmetic(x_BHTD.dtype)), 2, (-1, form.unit_tokens))
    if form.axis == "channel":
        codes, scale, zero = _encode_groups(units, 3, form, quantizer)
        return Encoded(codes, scale.squeeze(3), zero.squeeze(3))
    parts = []
    for part in _head_parts(units, form.group_size):  # (B, H, T, 1, groups, channels of a group)
        codes, scale, zero = _encode_groups(part, 5, form, quantizer)
        parts.append((codes.flatten(4), scale.flatten(3), zero.flatten(3)))
    codes, scale, zero = (torch.cat(pieces, dim=-1) for pieces in zip(*parts, strict=True))
    return Encoded(codes, scale, zero)


@torch.no_grad()
def decode(encoded: Encoded, form: Format, quantizer: Quantizer, out_BHTD: Tensor) -> Tensor:
    """Write the numbers that codes stand for into `out_BHTD`, (B, H, T, D), which may be strided; return it."""
    work = _arithmetic(out_BHTD.dtype)
    # A narrower result is computed beside it, and rounded once when it is copied.
    place = out_BHTD if out_BHTD.dtype == work else torch.empty(out_BHTD.shape, dtype=work, device=out_BHTD.device)
    units = torch.unflatten(place, 2, tuple(encoded.codes.shape[2:4]))  # (B, H, units, tokens a unit, D)
    if form.scheme == "rotated":
        _decode_rotated(encoded, form, quantizer, units)
    else:
        assert encoded.zero is not None
        scale, zero = encoded.scale.to(work).unsqueeze(3), encoded.zero.to(work).unsqueeze(3)
        units.copy_(encoded.codes)
        # Multiplied, then added: one fused operation would round differently at the ends of a vector.
        if form.axis == "channel":
            units.mul_(scale).add_(zero)
        else:
            first = 0
            for part in _head_parts(units, form.group_size):
                last = first + part.shape[4]
                part.mul_(scale[..., first:last, None]).add_(zero[..., first:last, None])
                first = last
    if place is not out_BHTD:
        largest = torch.finfo(out_BHTD.dtype).max  # the uppermost level may lie above it, by the rounding of a scale
        out_BHTD.copy_(place.clamp_(-largest, largest))
    return out_BHTD


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widest(device: torch.device) -> torch.dtype:
    """Return float64: summed in it, in whatever order, no number moves across a code's edge."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _head_parts(units: Tensor, group_size: int) -> list[Tensor]:
    """View the last dimension as (groups, channels of a group); what whole groups leave is a shorter group of its own.

    units: (..., D). Returns one or two views, (..., groups, channels).
    """
    head_dim = units.shape[-1]
    whole = head_dim // group_size * group_size
    parts = [] if whole == 0 else [torch.unflatten(units[..., :whole], -1, (-1, group_size))]
    return parts if whole == head_dim else [*parts, units[..., whole:].unsqueeze(-2)]


def _encode_groups(groups: Tensor, dim: int, form: Format, quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scale and zero of groups that lie along `dim`."""
    # Zero is added so that of -0.0 and 0.0, which are equal, it is 0.0 that is stored, whichever was found first.
    low, high = groups.amin(dim, keepdim=True) + 0.0, groups.amax(dim, keepdim=True)
    nothing = low * 0 + high * 0  # NaN where either is not finite: a clamp would hide an infinity
    low, high = low + nothing, high + nothing
    scale, zero = _stored_range(low, high, form, quantizer)
    if form.clip == "mse":
        middle, reach = (low + high) / 2, (high - low) / 2
        least = _squared_error(groups, scale, zero, dim, form)
        for fraction in CLIP_FRACTIONS[1:]:
            tried = _stored_range(middle - fraction * reach, middle + fraction * reach, form, quantizer)
            error = _squared_error(groups, *tried, dim, form)
            better = error < least
            scale, zero = (torch.where(better, new, old) for new, old in zip(tried, (scale, zero), strict=True))
            least = torch.where(better, error, least)
    codes = _codes(groups, scale, zero, form)
    return codes.masked_fill_(scale == 0, 0).to(torch.uint8), scale, zero


def _stored_range(low: Tensor, high: Tensor, form: Format, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Return scale and zero, as stored, of codes that span low to high."""
    # By a tensor: a GPU multiplies by the reciprocal of a number, which is not the same in the last place.
    scale = (high - low) / torch.full_like(low, 2**form.bits - 1)
    return (
        _stored(scale, quantizer.scale_dtype, largest_scale(form, quantizer.scale_dtype)),
        _stored(low, quantizer.zero_dtype),
    )


def _codes(groups: Tensor, scale: Tensor, zero: Tensor, form: Format) -> Tensor:
    """Return the codes of scale and zero as stored, in the groups' dtype; where the scale is 0, any."""
    codes = (groups - zero.to(groups.dtype)).div_(_nonzero(scale.to(groups.dtype)))
    return codes.round_().clamp_(0, 2**form.bits - 1)


def _squared_error(groups: Tensor, scale: Tensor, zero: Tensor, dim: int, form: Format) -> Tensor:
    restored = _codes(groups, scale, zero, form).mul_(scale.to(groups.dtype)).add_(zero.to(groups.dtype))
    # Squared when widened: of numbers below 1e-19 float32 holds no squares, of those above 1e19 none either.
    return restored.sub_(groups).to(_widest(groups.device)).square_().sum(dim, keepdim=True)


def _encode_rotated(x_BHTD: Tensor, form: Format, quantizer: Quantizer) -> Encoded:
    """Encode in the rotated basis."""
    head_dim, work = x_BHTD.shape[-1], _widest(x_BHTD.device)
    y = x_BHTD.to(work) @ rotation(head_dim, quantizer.rotation_seed, work, x_BHTD.device).T
    y = y / torch.full_like(y[..., :1], math.sqrt(head_dim))
    size = y.square().mean(-1, keepdim=True).sqrt_()  # (B, H, T, 1)
    size = size.masked_fill(size.isinf(), torch.nan)  # of a number that is not finite, which a clamp would hide
    scale = _stored(size, quantizer.scale_dtype, largest_scale(form, quantizer.scale_dtype))
    codes = level_cells(form.bits).codes_of(y / _nonzero(scale.to(work)))
    return Encoded(codes.unsqueeze(3), scale, None)


def _decode_rotated(encoded: Encoded, form: Format, quantizer: Quantizer, units: Tensor) -> None:
    """Write what codes stand for into `units`, (B, H, T, 1, D), back in the basis of the model."""
    head_dim, work, device = units.shape[-1], units.dtype, units.device
    levels = exact_levels(form.bits, head_dim).to(device=device, dtype=work)
    y = levels.index_select(0, encoded.codes.flatten().int()).view(-1, head_dim)
    x = y @ rotation(head_dim, quantizer.rotation_seed, work, device)
    scale = encoded.scale.to(work)
    scale = scale / torch.full_like(scale, math.sqrt(head_dim))
    torch.mul(x.view(units.shape), scale.unsqueeze(3), out=units)


def largest_scale(form: Format, dtype: str) -> float:
    """Return the largest scale that is stored in a dtype: with it, float32 holds whatever a code stands for.

    Of float16 that is its largest number. bfloat16 goes as far as float32 does, and codes multiply it.
    """
    if dtype == "float16":
        return torch.finfo(torch.float16).max
    times = 2**form.bits - 1.0
    if form.scheme == "rotated":  # all channels of a head may add up in one
        times = math.sqrt(form.group_size) * float(lloyd_max_levels(form.bits)[-1])
    return 2.0 ** math.floor(math.log2(torch.finfo(torch.float32).max / times))


def _nonzero(step: Tensor) -> Tensor:
    return step.masked_fill(step == 0, 1)


def _stored(number: Tensor, dtype: str, largest: float | None = None) -> Tensor:
    """Round a scale or zero to the dtype that it is stored in; beyond `largest`, its largest number, to that."""
    target: torch.dtype = getattr(torch, dtype)
    if largest is None:
        largest = torch.finfo(target).max
    return number.clamp(-largest, largest).to(target)
