"""Do the numbers beside a `loss_increase` agree with it? Its samples, its standard errors, the means of its sources.

Reads one tensor's numbers and what the file says of its text; returns a sentence about the first that contradicts.
Does not know layers, nor files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

MEAN_ROUNDING = 1e-6
"""Relative; what a mean may differ by that was written with fewer digits."""


class Losses(NamedTuple):
    """What one tensor's entry says of its losses, format by format; what it does not say is empty."""

    mean: Mapping[str, float]
    stderr: Mapping[str, float]
    by_source: Mapping[str, Mapping[str, float]]
    samples: Mapping[str, Sequence[float]]


def contradiction(losses: Losses, sequences: int | None, datasets: Sequence[str] | None) -> str | None:
    """Return what is wrong with a tensor's losses, as the predicate of a sentence about the tensor; None where nothing.

    sequences: how many the text has, where the file says it, else how many samples other tensors have; None where
    neither is known. datasets: the sources of the text, where the file names them.
    """
    for field, formats in _fields(losses):
        unscored = next((name for name in formats if name not in losses.mean), None)
        if unscored is not None:
            return f"has {field}[{unscored}] but no loss_increase[{unscored}]; remove the one, or add the other"
    for name, numbers in losses.samples.items():
        sequences = len(numbers) if sequences is None else sequences
        if len(numbers) != sequences or not numbers:
            return (
                f"has loss_increase_samples[{name}] of length {len(numbers)}, but there are {sequences} sequences; "
                "it takes one number a sequence"
            )
        mean = _mean(numbers)
        if not math.isclose(mean, losses.mean[name], rel_tol=MEAN_ROUNDING, abs_tol=1e-300):
            return (
                f"has {losses.mean[name]:.6g} as loss_increase[{name}], where its samples have the mean {mean:.6g}; "
                "correct it, or remove loss_increase_samples"
            )
    unknown = next((name for name in losses.by_source if datasets is not None and name not in datasets), None)
    if unknown is not None:
        return f"has loss_increase_by_source[{unknown}], which is none of the calibration's sources"
    return None


def _fields(losses: Losses) -> Iterable[tuple[str, Iterable[str]]]:
    yield "loss_increase_stderr", losses.stderr
    yield "loss_increase_samples", losses.samples
    for dataset, means in losses.by_source.items():
        yield f"loss_increase_by_source[{dataset}]", means


def _mean(numbers: Sequence[float]) -> float:
    total = sum(numbers)
    return total / len(numbers) if math.isfinite(total) else sum(number / len(numbers) for number in numbers)
