"""How sensitive is each layer's cache, on these sequences? Each one's own numbers, and the Scores that they make.

Reads a model and sequences of token ids; returns Scores. Does not know how a sequence is measured (gradients.py,
losses.py), where its text came from, nor files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from transformers import PreTrainedModel

from kvprof import __version__
from kvprof.calibration.sequences import Batch, CalibrationSet, batches
from kvprof.errors import KvprofError
from kvprof.models.load import input_device
from kvprof.profile.decoder import Decoder, Formats
from kvprof.profile.gradients import gradient_norms, padded_on_the_right
from kvprof.profile.losses import loss_increases
from kvprof.profile.samples import decoding_of, loss_scores
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.inventory import Inventory
from kvprof.records.scores import LayerScores, Scores, TensorScores

FIRST_STAGE = 4
"""Sequences of the first stage of a run that may stop early; each further stage has as many as all before it."""


@dataclass(frozen=True)
class SequenceResult:
    """What was measured on one sequence.

    norms: (key, value) gradient norm of each scored layer, ascending. losses: for each layer, tensor and format of
    `Formats`, in that order; empty where none were asked for.
    """

    norms: tuple[tuple[float, float], ...]
    losses: tuple[float, ...]


def measure_sensitivity(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    inventory: Inventory,
    formats: Formats | None = None,
    decoder: Decoder | None = None,
    batch_size: int = 1,
    done: Mapping[int, SequenceResult] | None = None,
    finished: Callable[[Mapping[int, SequenceResult]], None] = lambda results: None,
    is_enough: Callable[[Scores], bool] | None = None,
) -> Scores:
    """Measure the gradient norms of every layer's W_k and W_v, and the predicted losses of formats.

    model: in eval mode, no parameter asking for a gradient; left as it was found. formats: None or none at all leaves
    the losses out. done: results of sequences measured before, by index. finished: called with each batch's results.
    is_enough: asked of the scores so far, as `run_sensitivity` has it; sequences beyond are then not in the result.
    Returns Scores: means over sequences, with standard errors (of a single one, 0 for norms, none for losses).
    Raises NonFiniteGradient, with advice, where half precision overflows.
    """
    formats, decoder = formats or {}, decoder or Decoder()
    measured = dict(done or {})
    number = len(calibration.sequences)
    for stage in _stages(number) if is_enough is not None else [number]:
        todo = [index for index in range(stage) if index not in measured]
        for batch in batches(calibration.sequences, batch_size, todo):
            results = _measure(model, inventory.geometry, batch, formats, decoder, calibration.info.seed)
            finished(results)
            measured.update(results)
        text = calibration if stage == number else calibration.first(stage)
        scores = _assemble(measured, text, inventory, formats, decoder)
        if is_enough is not None and is_enough(scores):
            break
    return scores


def _measure(
    model: PreTrainedModel, geometry: CacheGeometry, batch: Batch, formats: Formats, decoder: Decoder, seed: int
) -> dict[int, SequenceResult]:
    """Return the results of each sequence of a batch, by index."""
    batch = padded_on_the_right(batch)
    try:
        norms = gradient_norms(model, geometry, batch)
        losses = (
            loss_increases(model, batch, formats, decoder.window, decoder.quantizer, decoder.suffix_fraction, seed)
            if formats
            else {}
        )
    except torch.OutOfMemoryError:
        rows, tokens = batch.input_ids.shape
        raise KvprofError(
            f"out of memory on {input_device(model)} with a batch of {rows} sequences of {tokens} tokens.\n"
            "  Lower --batch-size or --sequence-length; what is measured so far is kept."
        ) from None
    keys = [(layer, tensor, form.name) for (layer, tensor), forms in formats.items() for form in forms]
    return {
        index: SequenceResult(tuple(norms[index]), tuple(float(losses[key][row]) for key in keys))
        for row, index in enumerate(batch.indices)
    }


def _stages(number: int) -> Iterator[int]:
    """Yield FIRST_STAGE, its doubles, and at last the whole number."""
    stage = FIRST_STAGE
    while stage < number:
        yield stage
        stage *= 2
    yield number


def _assemble(
    measured: Mapping[int, SequenceResult],
    calibration: CalibrationSet,
    inventory: Inventory,
    formats: Formats,
    decoder: Decoder,
) -> Scores:
    """Return the scores of a set whose every sequence is measured."""
    # In the order of the sequences, whatever the batches were: the same sum to the last bit.
    results = [measured[index] for index in range(len(calibration.sequences))]
    norms = torch.tensor([result.norms for result in results], dtype=torch.float64)  # (sequences, layers, 2)
    columns = iter(zip(*(result.losses for result in results), strict=True))
    losses = {
        key: {form.name: [float(f"{loss:.6g}") for loss in next(columns)] for form in forms}
        for key, forms in formats.items()
    }

    def scored(row: int, layer: int, tensor: TensorName) -> TensorScores:
        norm = norms[:, row, TENSORS.index(tensor)].tolist()
        own = TensorScores(gradient_norm=fmean(norm), gradient_norm_stderr=_stderr(norm))
        of_formats = loss_scores(losses.get((layer, tensor), {}), calibration.info)
        return own.model_copy(update=dict(of_formats.model_dump(exclude_none=True)))

    return Scores(
        source="gradients",
        kvprof_version=__version__,
        model=inventory.model,
        calibration=calibration.info,
        geometry=inventory.geometry,
        decoding=decoding_of(calibration, decoder.window, decoder.suffix_fraction) if formats else None,
        layers=tuple(
            LayerScores(layer=layer.layer, key=scored(row, layer.layer, "key"), value=scored(row, layer.layer, "value"))
            for row, layer in enumerate(inventory.geometry.scored)
        ),
    )


def _stderr(numbers: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single number."""
    return stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
