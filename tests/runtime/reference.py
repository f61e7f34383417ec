"""The cache's rounding and its window, written a second time: NumPy, from the formulas of the design alone.

Arrays are (..., T, D) of float32 or float64; arithmetic is in the array's own dtype, that of `rotated` in float64.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import torch
from scipy.linalg import hadamard
from scipy.optimize import fsolve
from scipy.stats import norm

from kvprof.records.formats import Format
from kvprof.records.plan import Quantizer, TensorPlan, Window

FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def rounded(x: np.ndarray, form: Format, quantizer: Quantizer) -> np.ndarray:
    """Return what x, (..., T, D), comes back as; along axis `channel` T is a multiple of the group size."""
    if form.is_full:
        return x.copy()
    if form.scheme == "rotated":
        return rotated(x, form.bits, quantizer)[0]
    if form.axis == "channel":
        groups = x.reshape(*x.shape[:-2], -1, form.group_size, x.shape[-1]).swapaxes(-1, -2)
        return asymmetric(groups, form, quantizer)[0].swapaxes(-1, -2).reshape(x.shape)
    parts = np.split(x, range(form.group_size, x.shape[-1], form.group_size), axis=-1)
    return np.concatenate([asymmetric(part, form, quantizer)[0] for part in parts], axis=-1)


def asymmetric(groups: np.ndarray, form: Format, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """Round groups, which lie along the last axis; return them, and the quotients whose nearest integers are codes."""
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    best, quotients = between(groups, low, high, form.bits, quantizer)
    if form.clip == "mse":
        for fraction in FRACTIONS[1:]:
            middle, reach = (low + high) / 2, (high - low) / 2 * groups.dtype.type(fraction)
            tried, tried_quotients = between(groups, middle - reach, middle + reach, form.bits, quantizer)
            better = squared_error(tried, groups) < squared_error(best, groups)
            best = np.where(better, tried, best)
            quotients = np.where(better, tried_quotients, quotients)
    return best, quotients


def between(
    groups: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, quantizer: Quantizer
) -> tuple[np.ndarray, np.ndarray]:
    """Round groups to the 2^bits numbers from low to high; return them and the quotients."""
    top = 2**bits - 1
    scale = stored((high - low) / top, quantizer.scale_dtype).astype(groups.dtype)
    zero = stored(low, quantizer.zero_dtype).astype(groups.dtype)
    quotients = np.divide(groups - zero, scale, out=np.zeros_like(groups), where=scale > 0)
    return np.clip(np.rint(quotients), 0, top) * scale + zero, quotients


def squared_error(tried: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the sum of squared errors of each group, in float64."""
    return np.square(tried.astype(np.float64) - groups).sum(-1, keepdims=True)


def rotated(x: np.ndarray, bits: int, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """Round head vectors in the rotated basis; return them and their codes."""
    head_dim = x.shape[-1]
    generator = torch.Generator().manual_seed(quantizer.rotation_seed)
    signs = (torch.randint(0, 2, (head_dim,), generator=generator) * 2 - 1).numpy()
    basis = hadamard(head_dim) / math.sqrt(head_dim)  # symmetric
    y = (x.astype(np.float64) * signs) @ basis
    scale = stored(np.sqrt(np.square(y).mean(-1, keepdims=True)), quantizer.scale_dtype)
    levels = normal_levels(bits)
    unit = np.divide(y, scale, out=np.zeros_like(y), where=scale > 0)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, unit)
    return ((levels[codes] * scale) @ basis * signs).astype(x.dtype), codes


@functools.cache
def normal_levels(bits: int) -> np.ndarray:
    """Return 2^bits levels, each the mean of a standard normal between the midpoints to its neighbours."""
    count = 2**bits

    def distance(half: np.ndarray) -> np.ndarray:
        edges = np.concatenate([[0.0], (half[1:] + half[:-1]) / 2, [np.inf]])
        return (norm.pdf(edges[:-1]) - norm.pdf(edges[1:])) / (norm.sf(edges[:-1]) - norm.sf(edges[1:])) - half

    start = math.sqrt(3) * norm.ppf((np.arange(count // 2, count) + 0.5) / count)
    half, _, solved, message = fsolve(distance, start, xtol=1e-13, full_output=True)
    assert solved == 1 or np.abs(distance(half)).max() < 1e-12, message
    return np.concatenate([-half[::-1], half])


def stored(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Round to float16 or bfloat16, as a float64 array; beyond their range, to their largest number."""
    numbers = numbers.astype(np.float32)  # torch rounds a float64 to either by way of float32
    if dtype == "float16":
        return np.clip(numbers, -65504, 65504).astype(np.float16).astype(np.float64)
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    even = (bits >> 16) & 1
    return ((bits + 0x7FFF + even) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def given_back(x: np.ndarray, form: TensorPlan, window: Window, quantizer: Quantizer) -> np.ndarray:
    """Return what a cache that lets nothing go gives back of all of its tokens, x of (B, H, T, D)."""
    x, sinks, coded = x.copy(), window.sink_tokens, tokens_in_codes(x.shape[2], form, window)
    if coded:
        x[:, :, sinks : sinks + coded] = rounded(x[:, :, sinks : sinks + coded], form, quantizer)
    return x


def tokens_in_codes(tokens: int, form: TensorPlan, window: Window) -> int:
    """Return how many of a sequence's tokens are quantized: those that enough others follow, in whole groups."""
    if form.is_full:
        return 0
    group = form.group_size if form.axis == "channel" else 1
    needed = max(Fraction(window.recent_tokens), Fraction(str(form.recent_fraction)) * tokens)
    coded = 0
    while tokens - (window.sink_tokens + coded + group) >= needed:
        coded += group
    return coded


def first_held(tokens: int, form: TensorPlan, window: Window, span: int | None, head_dim: int) -> int:
    """Return the position of the first token that is kept, where queries see the last `span` tokens only.

    What the newest query did not see goes: a sink by itself, what is behind the sinks by groups, and by eight groups
    where the codes of a token and head end within a byte.
    """
    unseen = 0 if span is None else tokens - span
    sinks = 0 if form.is_full else window.sink_tokens
    together = 1 if form.is_full or form.axis == "token" else form.group_size
    if not form.is_full and head_dim * form.bits % 8:
        together *= 8
    first = 0
    while first + (step := 1 if first < sinks else together) <= unseen:
        first += step
    return first
