"""One number a sequence -> what Scores say of it: the mean, its standard error, each source's means, and of what text.

Plain arithmetic; does not know how a number was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from kvprof.calibration.sequences import CalibrationSet
from kvprof.records.plan import Window
from kvprof.records.scores import CalibrationInfo, DecodingSetup, TensorScores, suffix_start


def loss_scores(samples: Mapping[str, Sequence[float]], info: CalibrationInfo) -> TensorScores:
    """Return the loss_increase fields of one tensor from its numbers by format; no fields where there are none.

    A single sequence has no standard error, and leaves it out.
    """
    if not samples:
        return TensorScores()
    several = {name: numbers for name, numbers in samples.items() if len(numbers) > 1}
    return TensorScores(
        loss_increase={name: fmean(numbers) for name, numbers in samples.items()},
        loss_increase_stderr={name: stdev(numbers) / math.sqrt(len(numbers)) for name, numbers in several.items()}
        or None,
        loss_increase_by_source=_by_source(samples, info),
        loss_increase_samples={name: tuple(numbers) for name, numbers in samples.items()},
    )


def decoding_of(text: CalibrationSet, window: Window, suffix_fraction: float) -> DecodingSetup:
    """Return what decoder numbers measured on a text speak of, and the tokens that counted."""
    counted = sum(len(ids) - suffix_start(len(ids), suffix_fraction) for ids in text.sequences)
    return DecodingSetup(window=window, suffix_fraction=suffix_fraction, tokens=counted)


def _by_source(samples: Mapping[str, Sequence[float]], info: CalibrationInfo) -> dict[str, dict[str, float]] | None:
    """Return each source's own means, where texts were mixed."""
    if info.sources is None or info.source_of is None:
        return None
    rows = {
        source.dataset: [row for row, of in enumerate(info.source_of) if of == place]
        for place, source in enumerate(info.sources)
    }
    return {
        dataset: {name: fmean(numbers[row] for row in own) for name, numbers in samples.items()}
        for dataset, own in rows.items()
        if own
    }
