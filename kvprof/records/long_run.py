"""The loss that signed effects add up to: the long-run variance of their series.

Reads series of numbers; returns nats. Does not know models, tensors, nor plans.

Storing a tensor in a format changes a layer's attention output at position i by d_i; the loss, whose gradient there is
g_i, changes by g_i . d_i to first order. Where the labels are drawn from the model itself, half the expected square of
the sum of g_i . d_i over all positions, and over all tensors that are stored in a format, is the KL divergence of the
text to second order. Its expectation has cross terms, so the sum must be kept with its sign. With one draw of the
labels the square of the whole sum is a noisy number; since positions far apart share few labels, the long-run variance
of the series serves instead: products of blocks up to a bandwidth apart, with Bartlett's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvprof.records.effects import decode

Floats = NDArray[np.float64]

ROUNDING = 1e-10
"""The share of the largest sum of squares below which effects may be rounding alone, and decide nothing of others."""
TINY = float(np.finfo(np.float64).tiny)


def effects_of(texts: Sequence[str]) -> tuple[Floats, list[Floats]]:
    """Return the sum of squares of each sequence, (sequences,), and its block sums, (blocks,) each."""
    read = [np.array(decode(text), dtype=np.float64) for text in texts]
    return np.array([one[0] for one in read]), [one[1:] for one in read]


def long_run(series: Floats, bandwidth: int) -> Floats:
    """Return window sums whose squares add up to Bartlett's weighted sum of products.

    series: (..., K) block sums. bandwidth: in blocks; products of blocks k apart weigh 1 - k / bandwidth.
    Returns (..., K + bandwidth - 1). As sums of squares, such numbers are never negative.
    Source: W. K. Newey and K. D. West, Econometrica 55 (1987); overlapping windows as in Politis and Romano.
    """
    padding = [(0, 0)] * (series.ndim - 1)
    sums = np.pad(series, [*padding, (bandwidth, bandwidth - 1)]).cumsum(axis=-1)
    windows: Floats = (sums[..., bandwidth:] - sums[..., :-bandwidth]) / math.sqrt(bandwidth)
    return windows


def loss_of(series: Floats, bandwidth: int, tokens: int) -> float:
    """Return the KL divergence, in nats a token, that one sequence's block sums predict. tokens: that counted."""
    return float(0.5 * np.square(long_run(series, bandwidth)).sum() / tokens)


def blended(long: Floats, short: Floats, classes: NDArray[np.int64]) -> Floats:
    """Return the KL divergence of single formats of single tensors, of less noise than their long-run variance.

    What a format's long-run variance is of the sum of its squares differs little between tensors, and the latter is the
    less noisy by far. So the ratio of each is shrunk towards its class, as far as the spread of a class is noise; the
    jackknife over sequences tells that. Ratios are skewed, so it is their logarithms that are shrunk; a class keeps its
    mean ratio.

    long, short: (F, sequences), by the long-run variance and by squares of single positions alone. classes: (F,), equal
    for equal formats of keys, or of values. Returns (F, sequences), whose mean over sequences is the estimate, and
    whose spread is that of the estimate to first order.
    Source: B. Efron and C. Morris, J. Am. Stat. Assoc. 70 (1975), on shrinking many means at once.
    """
    number = long.shape[1]
    largest = short.mean(axis=1).max(initial=0.0)
    known = (short.mean(axis=1) > ROUNDING * largest) & (long.mean(axis=1) > ROUNDING * largest)
    long, base = np.where(known[:, None], long, 1.0), np.where(known[:, None], short, 1.0)
    ratios = long.mean(axis=1) / base.mean(axis=1)
    logs = np.log(ratios)
    towards = _class_means(logs, known, classes)
    own = 0.0
    if number > 1:
        left_out = np.log(np.maximum(_without_each(long), TINY)) - np.log(np.maximum(_without_each(base), TINY))
        noise = np.square(left_out - left_out.mean(axis=1, keepdims=True)).sum(axis=1) * (number - 1) / number
        own = 1 - share_of(float(noise[known].sum()), float(np.square(logs - towards)[known].sum()))
    shrunk = np.exp(own * logs + (1 - own) * towards)
    shrunk *= _class_means(ratios, known, classes) / _class_means(shrunk, known, classes)
    mixed: Floats = np.where(known[:, None], shrunk[:, None] * (own * long / ratios[:, None] + (1 - own) * base), short)
    return mixed


def _class_means(numbers: Floats, known: NDArray[np.bool_], classes: NDArray[np.int64]) -> Floats:
    """Return for each number the mean of the known ones of its class; 1 where none is known."""
    counts = np.bincount(classes, weights=known)
    means = np.bincount(classes, weights=np.where(known, numbers, 0.0)) / np.maximum(counts, 1)
    of_each: Floats = np.where(counts > 0, means, 1.0)[classes]
    return of_each


def _without_each(samples: Floats) -> Floats:
    """Return the mean of all sequences but one, for each one: (F, sequences)."""
    number = samples.shape[1]
    means: Floats = (samples.sum(axis=1, keepdims=True) - samples) / (number - 1)
    return means


def share_of(noise: float, spread: float) -> float:
    """Return the share of a spread that is noise, from 0 to 1."""
    return 1.0 if spread <= noise else noise / spread


def bandwidth_of(series: Sequence[Sequence[Floats]]) -> int:
    """Return the bandwidth, in blocks, that suits these series: at least 1.

    series: for each format of each tensor its series of every sequence. All share one bandwidth, since products of two
    tensors need the same as their squares; each counts alike, whatever its size, but for those left out by ROUNDING.
    Source: W. K. Newey and K. D. West, Review of Economic Studies 61 (1994), the plug-in rule for Bartlett's kernel, of
    the mean autocovariance.
    """
    longest = max((len(one) for every in series for one in every), default=1)
    blocks = sum(len(one) for one in series[0]) if series else 0
    most = min(longest - 1, int(4 * (blocks / 100) ** (2 / 9)))
    energies = [sum(float(one @ one) for one in every) for every in series]
    floor = ROUNDING * max(energies, default=0.0)
    known = [(every, energy) for every, energy in zip(series, energies, strict=True) if energy > floor]
    if most < 1 or not known:
        return 1
    lags = np.arange(1, most + 1)
    mean = np.zeros(most)
    for every, energy in known:
        for one in every:
            mean += [float(one[lag:] @ one[:-lag]) / energy for lag in lags if lag < len(one)] + [0.0] * int(
                (lags >= len(one)).sum()
            )
    mean /= len(known)
    total, slope = 1 + 2 * mean.sum(), 2 * (lags * mean).sum()
    if total <= 0:
        return 1
    suited = float(1.1447 * ((slope / total) ** 2 * blocks) ** (1 / 3))
    return max(1, min(longest, round(suited)))
