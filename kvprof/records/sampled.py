"""Each sequence's own numbers -> the Scores that they make: means, standard errors, each source's means.

Plain arithmetic, the same to the last bit whoever measured a sequence, and when. Does not know how. What is measured of
a format is a series of signed effects, block by block; its loss is the series' long-run variance, whose bandwidth all
formats share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import numpy as np

from kvprof import __version__
from kvprof.records.document import ModelInfo
from kvprof.records.formats import TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.long_run import Floats, bandwidth_of, blended, effects_of, loss_of
from kvprof.records.scores import CalibrationInfo, DecodingSetup, EffectBlocks, Scores, TensorScores, layer_scores


@dataclass(frozen=True)
class TensorSamples:
    """What was measured of one layer's keys or values: a number for each sequence, in the text's order.

    effects: by the format's name; of each sequence, a series as `effects.encode` has it.
    """

    gradient_norms: Sequence[float]
    effects: Mapping[str, Sequence[str]] = field(default_factory=dict)


def gradient_scores(
    samples: Mapping[tuple[int, TensorName], TensorSamples],
    text: CalibrationInfo,
    model: ModelInfo,
    geometry: CacheGeometry,
    decoding: DecodingSetup | None,
    block_tokens: int = 1,
    counted: Sequence[int] = (),
) -> Scores:
    """Return the scores of every layer that has keys and values of its own.

    block_tokens: positions of a block of the effects. counted: positions that counted, of each sequence.
    """
    keys = [(*key, name) for key, measured in samples.items() for name in measured.effects]
    found = [effects_of(samples[layer, tensor].effects[name]) for layer, tensor, name in keys]
    bandwidth = bandwidth_of([series for _, series in found])
    loss_of_key = _losses(keys, found, bandwidth, counted)

    def scored(layer: int, tensor: TensorName) -> TensorScores:
        norms, effects = samples[layer, tensor].gradient_norms, samples[layer, tensor].effects
        stderr = stdev(norms) / math.sqrt(len(norms)) if len(norms) > 1 else 0.0
        own = TensorScores(gradient_norm=fmean(norms), gradient_norm_stderr=stderr)
        losses = {
            # Six digits tell all that was measured, and keep a file of half a million numbers small.
            name: [float(f"{loss:.6g}") for loss in loss_of_key[layer, tensor, name]]
            for name in effects
        }
        update = dict(loss_scores(losses, text).model_dump(exclude_none=True))
        if effects:
            update["loss_effects"] = {name: tuple(texts) for name, texts in effects.items()}
        return own.model_copy(update=update)

    return Scores(
        source="gradients",
        kvprof_version=__version__,
        model=model,
        calibration=text,
        geometry=geometry,
        decoding=decoding,
        effects=EffectBlocks(block_tokens=block_tokens, bandwidth_blocks=bandwidth, tokens=tuple(counted))
        if keys
        else None,
        layers=tuple(
            layer_scores(shape.layer, scored(shape.layer, "key"), scored(shape.layer, "value"), shape.is_latent)
            for shape in geometry.scored
        ),
    )


def _losses(
    keys: Sequence[tuple[int, TensorName, str]],
    effects: Sequence[tuple[Floats, list[Floats]]],
    bandwidth: int,
    counted: Sequence[int],
) -> dict[tuple[int, TensorName, str], list[float]]:
    """Return each sequence's predicted KL of every format of every tensor."""
    if not keys:
        return {}
    names: dict[tuple[TensorName, str], int] = {}
    classes = np.array([names.setdefault((tensor, name), len(names)) for _, tensor, name in keys])
    long = [
        [loss_of(one, bandwidth, tokens) for one, tokens in zip(series, counted, strict=True)] for _, series in effects
    ]
    short = [squares / (2 * np.array(counted)) for squares, _ in effects]
    return dict(zip(keys, blended(np.array(long), np.array(short), classes).tolist(), strict=True))


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
