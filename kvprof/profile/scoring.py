"""How sensitive is each layer's cache, on these sequences? Each one's own numbers, and the Scores that they make.

Reads a model and sequences of token ids; returns Scores. Does not know how a sequence is measured (gradients.py,
losses.py), where its text came from, nor files.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.calibration.sequences import Batch, CalibrationSet, batches
from kvprof.errors import OutOfMemory
from kvprof.models.execution.upcast import computing_in_float32
from kvprof.models.identity import made_with
from kvprof.models.load import input_device
from kvprof.models.memory import memory_explained, settled_bytes
from kvprof.profile.decoder import Decoder, Formats, decoding_of
from kvprof.profile.distributed import ProcessGroup
from kvprof.profile.gradients import gradient_norms, padded_on_the_right
from kvprof.profile.loss_increase import loss_effects
from kvprof.records.effects import block_tokens, encode
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.inventory import Inventory
from kvprof.records.sampled import TensorSamples, gradient_scores
from kvprof.records.scores import Scores

logger = logging.getLogger(__name__)

FIRST_STAGE = 4
"""Sequences of the first stage of a run that may stop early; each further stage has as many as all before it."""


@dataclass(frozen=True)
class SequenceResult:
    """What was measured on one sequence.

    norms: (key, value) gradient norm of each scored layer, ascending. effects: for each layer, tensor and format of
    `Formats`, in that order, a series as `records.effects.encode` has it; empty where none were asked for.
    """

    norms: tuple[tuple[float, float], ...]
    effects: tuple[str, ...]


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
    indices: Sequence[int] | None = None,
    group: ProcessGroup | None = None,
) -> Scores:
    """Measure the gradient norms of every layer's W_k and W_v, and the predicted losses of formats.

    model: in eval mode, no parameter asking for a gradient; left as it was found. formats: None or none at all leaves
    the losses out. done: results of sequences measured before, by index. finished: called with each batch's results.
    is_enough: asked of the scores so far, as `run_sensitivity` has it; sequences beyond are then not in the result.
    A model in half precision computes in float32 meanwhile (`models.execution.upcast`). A batch that does not fit the
    memory is measured in batches of half the size, and so is all that follows: what is measured then is what that size
    gives.
    indices: the sequences to measure, all by default. group: the processes that measure a batch each at a time.
    Returns Scores: means over sequences, with standard errors (of a single one, 0 for norms, none for losses).
    Raises NonFiniteGradient, with advice, where half precision overflows.
    """
    formats, decoder, group = formats or {}, decoder or Decoder(), group or ProcessGroup()
    measured = dict(done or {})
    chosen = list(range(len(calibration.sequences)) if indices is None else indices)
    first, size = 0, batch_size
    counted = decoder.counted(calibration)
    block = block_tokens(max(counted))
    for stage in _stages(len(chosen)) if is_enough is not None else [len(chosen)]:
        measure = functools.partial(
            _measure_if_it_fits, model, inventory.geometry, formats, decoder, calibration.info.seed, block
        )
        with computing_in_float32(model):
            while todo := _left(calibration.sequences, size, chosen[first:stage], measured):
                for batch in group.turns(todo):
                    answers = group.together(functools.partial(measure, batch))
                    for results in answers:
                        if isinstance(results, dict) and results:
                            finished(results)
                            measured.update(results)
                    too_large = [answer for answer in answers if isinstance(answer, _TooLarge)]
                    if too_large:
                        size = _halved(size, too_large)
                        settled_bytes(input_device(model))
                        break
        first = stage
        text = calibration.taken(chosen[:stage])
        samples = samples_of([measured[index] for index in chosen[:stage]], inventory.geometry, formats)
        decoding = decoding_of(text, decoder.window, decoder.suffix_fraction) if formats else None
        scores = gradient_scores(
            samples,
            text.info,
            inventory.model,
            inventory.geometry,
            decoding,
            block,
            [counted[i] for i in chosen[:stage]],
        )
        scores = scores.model_copy(update={"made_with": made_with(model)})
        if is_enough is not None and is_enough(scores):
            break
    return scores


def _left(
    sequences: Sequence[Sequence[int]], batch_size: int, chosen: Sequence[int], measured: Container[int]
) -> list[Batch]:
    """Return what is left to measure, in batches.

    Which sequences share a batch does not depend on what is done: a resumed run rounds as one that was never stopped.
    """
    return [
        batch
        for whole in batches(sequences, batch_size, chosen)
        for batch in batches(sequences, batch_size, [index for index in whole.indices if index not in measured])
    ]


def samples_of(
    results: Sequence[SequenceResult], geometry: CacheGeometry, formats: Formats
) -> dict[tuple[int, TensorName], TensorSamples]:
    """Return the results of some sequences, tensor by tensor."""
    columns = iter(zip(*(result.effects for result in results), strict=True))
    effects = {key: {form.name: next(columns) for form in forms} for key, forms in formats.items()}
    return {
        (shape.layer, tensor): TensorSamples(
            [result.norms[row][place] for result in results], effects.get((shape.layer, tensor), {})
        )
        for row, shape in enumerate(geometry.scored)
        for place, tensor in enumerate(TENSORS)
    }


@dataclass(frozen=True)
class _TooLarge:
    """A batch that did not fit the memory. reason: in words."""

    rows: int
    reason: str


def _halved(size: int, too_large: Sequence[_TooLarge]) -> int:
    """Return the half of a batch size; a quarter and so on, until fewer sequences share a batch than did not fit."""
    least = min(batch.rows for batch in too_large)
    while size >= least:
        size //= 2
    logger.warning("%s: going on with --batch-size %d", too_large[0].reason, size)
    return size


def _measure_if_it_fits(
    model: PreTrainedModel,
    geometry: CacheGeometry,
    formats: Formats,
    decoder: Decoder,
    seed: int,
    block: int,
    batch: Batch | None,
) -> dict[int, SequenceResult] | _TooLarge:
    """Return the results of each sequence of a batch, by index; of no batch, none.

    Raises OutOfMemory where even a single sequence is too large.
    """
    if batch is None:
        return {}
    rows, tokens = batch.input_ids.shape
    what = f"a batch of {rows} sequences" if rows > 1 else "a single sequence"
    reason = f"out of memory on {input_device(model)} with {what} of {tokens} tokens"
    try:
        with memory_explained(reason):
            return _measure(model, geometry, formats, decoder, seed, block, batch)
    except OutOfMemory as error:
        if rows > 1:
            return _TooLarge(rows, reason)
        advice = "Lower --sequence-length, try --stream or --device cpu"
        raise OutOfMemory(f"{error}.\n  {advice}; what is measured so far is kept.") from None


def _measure(
    model: PreTrainedModel,
    geometry: CacheGeometry,
    formats: Formats,
    decoder: Decoder,
    seed: int,
    block: int,
    batch: Batch,
) -> dict[int, SequenceResult]:
    batch = padded_on_the_right(batch)
    norms = gradient_norms(model, geometry, batch)
    how = (decoder.window, decoder.quantizer, decoder.suffix_fraction, seed)
    effects = loss_effects(model, batch, formats, *how) if formats else {}
    keys = [(layer, tensor, form.name) for (layer, tensor), forms in formats.items() for form in forms]
    return {
        index: SequenceResult(tuple(norms[index]), tuple(_encoded(effects[key][row], block) for key in keys))
        for row, index in enumerate(batch.indices)
    }


def _encoded(effects: Tensor, block: int) -> str:
    """Return the text of one sequence's effects, (N,), summed over blocks of so many positions."""
    sums = torch.nn.functional.pad(effects, (0, -len(effects) % block)).view(-1, block).sum(1)
    return encode(float(effects.square().sum()), sums.tolist())


def _stages(number: int) -> Iterator[int]:
    """Yield FIRST_STAGE, its doubles, and at last the whole number."""
    stage = FIRST_STAGE
    while stage < number:
        yield stage
        stage *= 2
    yield number
