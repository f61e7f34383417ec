"""Spearman's rank correlation, ties and all.

Plain numbers in, one number out; no SciPy, which only an extra brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import StatisticsError, correlation

LEAST_NUMBERS = 3
"""Of fewer, a rank correlation says nothing."""


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, equal numbers sharing the mean of their ranks.

    None for fewer than LEAST_NUMBERS numbers, or where either side is constant.
    """
    if len(first) < LEAST_NUMBERS:
        return None
    try:
        return correlation(ranks(first), ranks(second))
    except StatisticsError:  # a constant has no ranks
        return None


def ranks(numbers: Sequence[float]) -> list[float]:
    """Return the rank of each number, 1 for the least; equal numbers share the mean of theirs."""
    found = [0.0] * len(numbers)
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    before = 0
    for _, group in groupby(order, key=numbers.__getitem__):
        tied = list(group)
        for place in tied:
            found[place] = before + (len(tied) + 1) / 2
        before += len(tied)
    return found
