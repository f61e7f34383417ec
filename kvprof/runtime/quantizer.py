"""Keys and values -> codes, scales and zero points, and back. The one place where a cached number is rounded.

Knows the two schemes, `asymmetric` and `rotated`; does not know layers, windows, nor how codes are packed. What a token
becomes depends on its own group alone: the same bits come out whatever is encoded or decoded with it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprof.records.formats import Format
from kvprof.records.plan import Quantizer

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


def unit_tokens(form: Format) -> int:
    """Return how many tokens are quantized together."""
    return form.group_size if form.axis == "channel" else 1


def fake_quantize(x_BHTD: Tensor, form: Format, quantizer: Quantizer = USUAL) -> Tensor:
    """Return what a cache that stores keys or values in this format gives back.

    x_BHTD: (B, H, T, D), any float dtype, which the result has too. Axis `channel`: T is a multiple of the group size,
    and groups start at the first token. Arithmetic is float32, of float64 tensors float64.
    quantizer: the dtypes of scale and zero, and the seed of the rotation. No gradient passes through the rounding.
    """
    if form.is_full:
        return x_BHTD
    return decode(encode(x_BHTD, form, quantizer), form, quantizer, torch.empty_like(x_BHTD))


@torch.no_grad()
def encode(x_BHTD: Tensor, form: Format, quantizer: Quantizer = USUAL) -> Encoded:
    """Return the codes of keys or values, (B, H, T, D), T a multiple of the tokens in a unit."""
    if form.scheme == "rotated":
        return _encode_rotated(x_BHTD, form, quantizer)
    units = torch.unflatten(x_BHTD.to(_arithmetic(x_BHTD.dtype)), 2, (-1, unit_tokens(form)))
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
        out_BHTD.copy_(place)
    return out_BHTD


@functools.cache
def lloyd_max_levels(bits: int) -> Tensor:
    """Return the 2^bits reproduction levels of least squared error for a standard normal, ascending, float64.

    Each level is the mean of the normal between the midpoints to its neighbours (Lloyd 1982, Max 1960). Newton's method
    on the positive half; the other half mirrors it. 1 bit: 0.7979; 2 bits: 0.4528, 1.5104.
    """
    half = 2 ** (bits - 1)
    # At many levels they lie like the quantiles of a normal of variance 3 (Panter and Dite 1951): a start nearby.
    position = (torch.arange(half, dtype=torch.float64) + half + 0.5) / (2 * half)
    levels = math.sqrt(3) * torch.special.ndtri(position)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(100):
        middle = (levels[1:] + levels[:-1]) / 2
        low, high = torch.cat([torch.zeros(1, dtype=torch.float64), middle]), torch.cat([middle, infinity])
        density_low, density_high = (torch.exp(-edge.square() / 2) / math.sqrt(2 * math.pi) for edge in (low, high))
        mass = (torch.special.erfc(low / math.sqrt(2)) - torch.special.erfc(high / math.sqrt(2))) / 2
        mean = (density_low - density_high) / mass
        # How a cell's mean moves with its edges; an edge moves by half of what either neighbour does.
        by_low = density_low * (mean - low) / mass / 2
        by_high = density_high[:-1] * (high - mean)[:-1] / mass[:-1] / 2
        by_low[0] = 0.0  # the edge at 0 stays
        jacobian = torch.diag(1 - by_low) - torch.diag(by_low[1:], -1) - torch.diag(by_high, 1)
        jacobian[range(half - 1), range(half - 1)] -= by_high
        step = torch.linalg.solve(jacobian, levels - mean)
        while bool(((levels - step).diff() <= 0).any()) or bool(levels[0] <= step[0]):
            step = step / 2  # the levels stay ascending and positive
        levels = levels - step
        if float(step.abs().max()) < 1e-14:
            break
    return torch.cat([-levels.flip(0), levels])


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
    codes, scale, zero = _encode_range(groups, low, high, form, quantizer)
    if form.clip == "none":
        return codes, scale, zero
    middle, reach = (low + high) / 2, (high - low) / 2
    least = _squared_error(groups, codes, scale, zero, dim)
    for fraction in CLIP_FRACTIONS[1:]:
        tried = _encode_range(groups, middle - fraction * reach, middle + fraction * reach, form, quantizer)
        error = _squared_error(groups, *tried, dim)
        better = error < least
        codes, scale, zero = (
            torch.where(better, new, old) for new, old in zip(tried, (codes, scale, zero), strict=True)
        )
        least = torch.where(better, error, least)
    return codes, scale, zero


def _encode_range(
    groups: Tensor, low: Tensor, high: Tensor, form: Format, quantizer: Quantizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scale and zero where the codes span low to high; the codes are of scale and zero as stored."""
    top = 2**form.bits - 1
    # By a tensor: a GPU multiplies by the reciprocal of a number, which is not the same in the last place.
    scale = _stored((high - low) / torch.full_like(low, top), quantizer.scale_dtype)
    zero = _stored(low, quantizer.zero_dtype)
    step = scale.to(groups.dtype)
    codes = ((groups - zero.to(groups.dtype)) / _nonzero(step)).round_().clamp_(0, top)
    return codes.masked_fill_(step == 0, 0).to(torch.uint8), scale, zero


def _squared_error(groups: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, dim: int) -> Tensor:
    restored = (codes * scale.to(groups.dtype)).add_(zero.to(groups.dtype))
    return restored.sub_(groups).square_().sum(dim, keepdim=True, dtype=_widest(groups.device))


def _encode_rotated(x_BHTD: Tensor, form: Format, quantizer: Quantizer) -> Encoded:
    """Encode in the rotated basis."""
    head_dim, work = x_BHTD.shape[-1], _widest(x_BHTD.device)
    y = x_BHTD.to(work) @ rotation(head_dim, quantizer.rotation_seed, work, x_BHTD.device).T
    y = y / torch.full_like(y[..., :1], math.sqrt(head_dim))
    scale = _stored(y.square().mean(-1, keepdim=True).sqrt_(), quantizer.scale_dtype)  # (B, H, T, 1)
    edges = level_edges(form.bits).to(device=y.device, dtype=work)
    codes = torch.bucketize(y / _nonzero(scale.to(work)), edges, out_int32=True)
    return Encoded(codes.to(torch.uint8).unsqueeze(3), scale, None)


def _decode_rotated(encoded: Encoded, form: Format, quantizer: Quantizer, units: Tensor) -> None:
    """Write what codes stand for into `units`, (B, H, T, 1, D), back in the basis of the model."""
    head_dim, work, device = units.shape[-1], units.dtype, units.device
    levels = exact_levels(form.bits, head_dim).to(device=device, dtype=work)
    y = levels.index_select(0, encoded.codes.flatten().int()).view(-1, head_dim)
    x = y @ rotation(head_dim, quantizer.rotation_seed, work, device)
    scale = encoded.scale.to(work)
    scale = scale / torch.full_like(scale, math.sqrt(head_dim))
    torch.mul(x.view(units.shape), scale.unsqueeze(3), out=units)


@functools.cache
def level_edges(bits: int) -> Tensor:
    """Return what lies between neighbouring levels, where a number's code changes: (2^bits - 1,), float64."""
    levels = lloyd_max_levels(bits)
    return (levels[1:] + levels[:-1]) / 2


@functools.cache
def exact_levels(bits: int, head_dim: int) -> Tensor:
    """Return the Lloyd-Max levels, rounded so that float32 holds any sum of `head_dim` of them exactly.

    With 24 bits of which a sum needs log2(head_dim) and the largest level its own, 17 are left behind the point for 2
    bits and 64 channels: 4e-6 at most is lost. In return the rotation is exact, so that what a token comes back as
    depends on no order of summing: on no batch, no block and no device. TF32, which torch leaves off unless it is asked
    for, would cut the levels short.
    """
    levels = lloyd_max_levels(bits)
    places = 24 - math.ceil(math.log2(head_dim * float(levels[-1])))
    return (levels * 2.0**places).round() / 2.0**places


@functools.lru_cache(maxsize=64)
def rotation(head_dim: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return H diag(s), entries 1 and -1: Sylvester's Hadamard matrix, its columns with the signs that the seed draws.

    x diag(s) H / sqrt(D) rotates, and y H diag(s) / sqrt(D) rotates back.
    """
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < head_dim:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return (hadamard * rotation_signs(head_dim, seed)).to(device=device, dtype=dtype)


def rotation_signs(head_dim: int, seed: int) -> Tensor:
    """Return the signs s that a rotation begins with, (D,), int64."""
    return torch.randint(0, 2, (head_dim,), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _nonzero(step: Tensor) -> Tensor:
    return step.masked_fill(step == 0, 1)


def _stored(number: Tensor, dtype: str) -> Tensor:
    """Round a scale or zero to the dtype that it is stored in; beyond its range, to its largest number."""
    target: torch.dtype = getattr(torch, dtype)
    largest = torch.finfo(target).max
    return number.clamp(-largest, largest).to(target)
