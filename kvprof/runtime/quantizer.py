"""Keys and values -> codes, scales and zero points, and back. The one place where a cached number is rounded.

Knows the two schemes, `asymmetric` and `rotated`; does not know layers, windows, nor how codes are packed. What a token
becomes depends on its own group alone: the same bits come out whatever is encoded with it, in one call or in many.
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
    """A tensor in codes.

    codes: (B, H, T, D), uint8. scale, zero: axis `channel` (B, H, T / group_size, D), axis `token` (B, H, T, groups a
    head); `rotated` has no zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def fake_quantize(x_BHTD: Tensor, form: Format, quantizer: Quantizer = USUAL) -> Tensor:
    """Return what a cache that stores keys or values in this format gives back.

    x_BHTD: (B, H, T, D), any float dtype, which the result has too. Axis `channel`: T is a multiple of the group size;
    groups start at the first token. Arithmetic is float32, of float64 tensors float64.
    quantizer: the dtypes of scale and zero, and the seed of the rotation.
    """
    if form.is_full:
        return x_BHTD
    return decode(encode(x_BHTD, form, quantizer), form, quantizer, torch.empty_like(x_BHTD))


def encode(x_BHTD: Tensor, form: Format, quantizer: Quantizer = USUAL) -> Encoded:
    """Return the codes of keys or values, (B, H, T, D), T a multiple of the group size where the axis is `channel`."""
    x_BHTD = x_BHTD.to(_arithmetic(x_BHTD.dtype))
    if form.scheme == "rotated":
        return _encode_rotated(x_BHTD, form, quantizer)
    if form.axis == "channel":
        groups = x_BHTD.unflatten(2, (-1, form.group_size))  # (B, H, groups, group_size, D)
        codes, scale, zero = _encode_groups(groups, 3, form, quantizer)
        return Encoded(codes.flatten(2, 3), scale.squeeze(3), zero.squeeze(3))
    parts = []
    for part, group_size in _channel_parts(x_BHTD, form.group_size):
        groups = part.unflatten(3, (-1, group_size))  # (B, H, T, groups, group_size)
        codes, scale, zero = _encode_groups(groups, 4, form, quantizer)
        parts.append((codes.flatten(3, 4), scale.squeeze(4), zero.squeeze(4)))
    if len(parts) == 1:
        return Encoded(*parts[0])
    return Encoded(*(torch.cat(pieces, dim=3) for pieces in zip(*parts, strict=True)))


def decode(encoded: Encoded, form: Format, quantizer: Quantizer, out_BHTD: Tensor) -> Tensor:
    """Write the numbers that codes stand for into `out_BHTD`, (B, H, T, D), which may be strided; return it."""
    work = _arithmetic(out_BHTD.dtype)
    # A strided or narrower result is computed beside it and rounded once, when it is copied.
    place = out_BHTD if out_BHTD.dtype == work else torch.empty(out_BHTD.shape, dtype=work, device=out_BHTD.device)
    scale = encoded.scale.to(work)
    if form.scheme == "rotated":
        levels = lloyd_max_levels(form.bits).to(work).to(place.device)
        y = levels[encoded.codes.int()].mul_(scale)
        place.copy_(_hadamard(y).mul_(_signs(quantizer.rotation_seed, y.shape[-1], y.device)))
    else:
        assert encoded.zero is not None
        zero = encoded.zero.to(work)
        # Multiplied, then added: one fused operation would round differently at the ends of a vector.
        if form.axis == "channel":
            groups = place.unflatten(2, (-1, form.group_size))
            torch.mul(encoded.codes.unflatten(2, (-1, form.group_size)), scale.unsqueeze(3), out=groups)
            groups.add_(zero.unsqueeze(3))
        else:
            first = 0
            pairs = zip(
                _channel_parts(place, form.group_size), _channel_parts(encoded.codes, form.group_size), strict=True
            )
            for (part, group_size), (codes, _) in pairs:
                groups = part.unflatten(3, (-1, group_size))
                last = first + groups.shape[3]
                torch.mul(codes.unflatten(3, (-1, group_size)), scale[..., first:last, None], out=groups)
                groups.add_(zero[..., first:last, None])
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
    # High-rate levels lie like the quantiles of a normal with the variance 3 (Panter and Dite 1951): a start nearby.
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
        by_high = torch.where(density_high > 0, density_high * (high - mean) / mass / 2, 0.0)
        by_low[0] = 0.0  # the edge at 0 stays
        by_high[-1] = 0.0
        jacobian = torch.diag(1 - by_low - by_high) - torch.diag(by_low[1:], -1) - torch.diag(by_high[:-1], 1)
        step = torch.linalg.solve(jacobian, levels - mean)
        while bool(((levels - step).diff() <= 0).any()) or bool(levels[0] <= step[0]):
            step = step / 2  # the levels stay ascending and positive
        levels = levels - step
        if float(step.abs().max()) < 1e-14:
            break
    return torch.cat([-levels.flip(0), levels])


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _channel_parts(x: Tensor, group_size: int) -> list[tuple[Tensor, int]]:
    """Cut the last dimension where whole groups end; the rest is a shorter group of its own."""
    head_dim = x.shape[-1]
    whole = head_dim // group_size * group_size
    parts = [(x[..., :whole], group_size), (x[..., whole:], head_dim - whole)]
    return [(part, size) for part, size in parts if part.shape[-1] > 0]


def _encode_groups(groups: Tensor, dim: int, form: Format, quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scale and zero of groups that lie along `dim`."""
    low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
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
    scale = _stored((high - low) / top, quantizer.scale_dtype)
    zero = _stored(low, quantizer.zero_dtype)
    step = scale.to(groups.dtype)
    steps = (groups - zero.to(groups.dtype)) / torch.where(step == 0, torch.ones_like(step), step)
    codes = torch.where(step == 0, torch.zeros_like(steps), steps.round_()).clamp_(0, top)
    return codes.to(torch.uint8), scale, zero


def _squared_error(groups: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, dim: int) -> Tensor:
    restored = (codes * scale.to(groups.dtype)).add_(zero.to(groups.dtype))
    return restored.sub_(groups).square_().sum(dim, keepdim=True)


def _encode_rotated(x_BHTD: Tensor, form: Format, quantizer: Quantizer) -> Encoded:
    head_dim = x_BHTD.shape[-1]
    y = _hadamard(x_BHTD * _signs(quantizer.rotation_seed, head_dim, x_BHTD.device))
    scale = _stored(_mean_of_squares(y).sqrt_(), quantizer.scale_dtype)  # (B, H, T, 1)
    step = scale.to(y.dtype)
    levels = lloyd_max_levels(form.bits)
    edges = ((levels[1:] + levels[:-1]) / 2).to(y.dtype).to(y.device)
    codes = torch.bucketize(y.div_(torch.where(step == 0, torch.ones_like(step), step)), edges, out_int32=True)
    return Encoded(codes.to(torch.uint8), scale, None)


def _mean_of_squares(y: Tensor) -> Tensor:
    """Return the mean of squares over the last dimension, a power of two, added up pairwise in a fixed order."""
    total = y.square()
    while total.shape[-1] > 1:
        total = total[..., ::2] + total[..., 1::2]
    return total / y.shape[-1]


def _hadamard(x: Tensor) -> Tensor:
    """Multiply the last dimension, a power of two, by Sylvester's Hadamard matrix over its root.

    Sums and differences of pairs, with the head's channels in front so that the arithmetic runs along the tokens: no
    matrix product, whose last bits may depend on how many tokens there are.
    """
    head_dim = x.shape[-1]
    y = x.reshape(-1, head_dim).t().contiguous()  # (D, tokens)
    span = 1
    while span < head_dim:
        pairs = y.view(head_dim // (2 * span), 2, span, -1)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        span *= 2
    return y.view(head_dim, -1).t().contiguous().mul_(1 / math.sqrt(head_dim)).view(x.shape)


@functools.lru_cache(maxsize=64)
def _signs(seed: int, head_dim: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (head_dim,), generator=generator) * 2 - 1).to(device)


def _stored(number: Tensor, dtype: str) -> Tensor:
    """Round a scale or zero to the dtype that it is stored in; beyond its range, to its largest number."""
    target: torch.dtype = getattr(torch, dtype)
    largest = torch.finfo(target).max
    return number.clamp(-largest, largest).to(target)
