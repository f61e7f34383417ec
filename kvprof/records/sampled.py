"""Each sequence's own numbers -> the Scores that they make: means, standard errors, each source's means.

Plain arithmetic, the same to the last bit whoever measured a sequence, and when. Does not know how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from kvprof import __version__
from kvprof.records.document import ModelInfo
from kvprof.records.formats import TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.scores import CalibrationInfo, DecodingSetup, LayerScores, Scores, TensorScores


@dataclass(frozen=True)
class TensorSamples:
    """What was measured of one layer's keys or values: a number for each sequence, in the text's order.

    losses: by the format's name.
    """

    gradient_norms: Sequence[float]
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)


def gradient_scores(
    samples: Mapping[tuple[int, TensorName], TensorSamples],
    text: CalibrationInfo,
    model: ModelInfo,
    geometry: CacheGeometry,
    decoding: DecodingSetup | None,
) -> Scores:
    """Return the scores of every layer that has keys and values of its own."""

    def scored(layer: int, tensor: TensorName) -> TensorScores:
        norms, losses = samples[layer, tensor].gradient_norms, samples[layer, tensor].losses
        stderr = stdev(norms) / math.sqrt(len(norms)) if len(norms) > 1 else 0.0
        own = TensorScores(gradient_norm=fmean(norms), gradient_norm_stderr=stderr)
        return own.model_copy(update=dict(loss_scores(losses, text).model_dump(exclude_none=True)))

    return Scores(
        source="gradients",
        kvprof_version=__version__,
        model=model,
        calibration=text,
        geometry=geometry,
        decoding=decoding,
        layers=tuple(
            LayerScores(layer=shape.layer, key=scored(shape.layer, "key"), value=scored(shape.layer, "value"))
            for shape in geometry.scored
        ),
    )


def loss_scores(samples: Mapping[str, Sequence[float]], text: CalibrationInfo) -> TensorScores:
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
        loss_increase_by_source=_by_source(samples, text),
        loss_increase_samples={name: tuple(numbers) for name, numbers in samples.items()},
    )


def _by_source(samples: Mapping[str, Sequence[float]], text: CalibrationInfo) -> dict[str, dict[str, float]] | None:
    """Return each source's own means, where texts were mixed."""
    if text.sources is None or text.source_of is None:
        return None
    rows = {
        source.dataset: [row for row, of in enumerate(text.source_of) if of == place]
        for place, source in enumerate(text.sources)
    }
    return {
        dataset: {name: fmean(numbers[row] for row in own) for name, numbers in samples.items()}
        for dataset, own in rows.items()
        if own
    }
