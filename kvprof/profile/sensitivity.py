"""How sensitive is each layer's cache, on calibration text? The two measurements that read text, in one resumable run.

Reads a model and calibration text; writes gradients.json, and a journal while it runs. Does not know how a sequence is
measured (gradients.py, losses.py), nor what the scores are spent on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import PreTrainedModel

from kvprof import __version__
from kvprof.calibration.ingredients import USUAL_DATA
from kvprof.calibration.mix import mix_texts
from kvprof.calibration.self_text import fill
from kvprof.calibration.sequences import Batch, CalibrationSet, batches, choose_length
from kvprof.errors import KvprofError, UnsupportedAttention, UsageError, first_line
from kvprof.models.identity import checkpoint_fingerprint, live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.load import ModelSource, input_device, load_config, load_model, load_tokenizer
from kvprof.profile.decoder import Decoder, Formats, formats_of, readable
from kvprof.profile.gradients import gradient_norms, padded_on_the_right
from kvprof.profile.losses import loss_increases
from kvprof.profile.samples import loss_scores
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.inventory import Inventory
from kvprof.records.runs import Journal
from kvprof.records.scores import (
    DecodingSetup,
    LayerScores,
    Scores,
    TensorScores,
    suffix_start,
)
from kvprof.runtime.interception import AttentionCall, attention_through

FIRST_STAGE = 4
"""Sequences of the first stage of a run that may stop early; each further stage has as many as all before it."""


@dataclass(frozen=True)
class SensitivitySettings:
    """What to measure on, and how.

    data: sources of text with their weights, as `calibration.ingredients` reads them. sequence_length: None as
    `calibration.sequences.choose_length` has it. dtype, device: as `models.load.load_model` takes them. batch_size:
    sequences in one forward; changes no score.
    """

    data: tuple[str, ...] = USUAL_DATA
    split: str | None = None
    sequences: int = 16
    sequence_length: int | None = None
    batch_size: int = 1
    seed: int = 0
    pack: bool = False
    dtype: str = "auto"
    device: str = "auto"
    decoder: Decoder = field(default_factory=Decoder)


@dataclass(frozen=True)
class SensitivityRun:
    """A finished run: its scores, the file they are in, and what a reader of them should know."""

    scores: Scores
    path: Path
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class SequenceResult:
    """What was measured on one sequence.

    norms: (key, value) gradient norm of each scored layer, ascending. losses: for each layer, tensor and format of
    `Formats`, in that order; empty where none were asked for.
    """

    norms: tuple[tuple[float, float], ...]
    losses: tuple[float, ...]


def run_sensitivity(
    source: ModelSource,
    settings: SensitivitySettings,
    folder: Path,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    writing: Callable[[int, int], None] = lambda done, total: None,
    is_enough: Callable[[Scores], bool] | None = None,
) -> SensitivityRun:
    """Load a model, measure it on calibration text and write gradients.json; go on where a stopped run was.

    folder: for the result, and for the journal of finished sequences meanwhile. progress: called with (sequences done,
    sequences in all); writing: with (tokens done, tokens in all) of text that the model writes itself first. is_enough:
    asked after FIRST_STAGE sequences and at each doubling; where it says so, the rest is left.
    Raises KvprofError in its many kinds: the model, the text, a setting or the journal is not fit.
    """
    if settings.batch_size < 1:
        raise UsageError(f"--batch-size {settings.batch_size}: at least 1 is needed.")
    whole_config = load_config(source)
    inventory = take_inventory(whole_config, source.id)
    formats = formats_of(inventory.geometry, settings.decoder)
    config = whole_config.get_text_config(decoder=True)
    length = choose_length(settings.sequence_length, getattr(config, "max_position_embeddings", None))
    tokenizer = load_tokenizer(source)
    mix = mix_texts(settings.data, settings.split, tokenizer, settings.sequences, length, settings.seed, settings.pack)
    mix.check_vocabulary(config.vocab_size)
    formats, unread = readable(formats, settings.decoder, max(mix.lengths))
    model = load_model(source, settings.dtype, settings.device)
    fingerprint = live_fingerprint(model, inventory.geometry) or checkpoint_fingerprint(source, inventory.geometry)
    calibration = fill(mix, model, tokenizer, fingerprint, writing)
    inventory = inventory.model_copy(update={"model": inventory.model.model_copy(update={"fingerprint": fingerprint})})
    unsupported = _why_unsupported(model, formats, calibration)
    if unsupported is not None:
        formats = {}
    asked = any((settings.decoder.formats or {}).values())  # by name, and so not to be left out in silence
    if asked and not any(formats.values()):
        raise UsageError(str(unsupported or unread))
    identity = {
        "model": source.id,
        "model fingerprint": fingerprint,
        "dtype": str(model.dtype),
        "kvprof version": __version__,
        **calibration.identity,
        "formats": [[layer, tensor, *(form.name for form in forms)] for (layer, tensor), forms in formats.items()],
        "window": settings.decoder.window.model_dump(),
        "suffix fraction": settings.decoder.suffix_fraction,
    }
    with Journal(folder / "gradients.journal", identity, restart) as log:
        done = {int(index): _from_json(result) for index, result in log.done.items()}
        progress(len(done), len(calibration.sequences))

        def finished(results: Mapping[int, SequenceResult]) -> None:
            for index, result in results.items():
                log.add(str(index), [result.norms, result.losses])
            progress(len(log.done), len(calibration.sequences))

        scores = measure_sensitivity(
            model, calibration, inventory, formats, settings.decoder, settings.batch_size, done, finished, is_enough
        )
        path = scores.save(folder / "gradients.json")
        log.remove()
    remarks = [remark for remark in (unsupported, unread) if remark] + list(
        _remarks(calibration, settings, len(done), scores)
    )
    return SensitivityRun(scores, path, tuple(remarks))


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
    Returns Scores: means over sequences, with standard errors (0 for a single one).
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
            f"out of memory on {model.device} with a batch of {rows} sequences of {tokens} tokens.\n"
            "  Lower --batch-size or --sequence-length; what is measured so far is kept."
        ) from None
    keys = [(layer, tensor, form.name) for (layer, tensor), forms in formats.items() for form in forms]
    return {
        index: SequenceResult(tuple(norms[index]), tuple(float(losses[key][row]) for key in keys))
        for row, index in enumerate(batch.indices)
    }


def _from_json(entry: Any) -> SequenceResult:
    norms, losses = entry
    return SequenceResult(tuple((key, value) for key, value in norms), tuple(losses))


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

    counted = sum(len(ids) - suffix_start(len(ids), decoder.suffix_fraction) for ids in calibration.sequences)
    return Scores(
        source="gradients",
        kvprof_version=__version__,
        model=inventory.model,
        calibration=calibration.info,
        geometry=inventory.geometry,
        decoding=DecodingSetup(window=decoder.window, suffix_fraction=decoder.suffix_fraction, tokens=counted)
        if formats
        else None,
        layers=tuple(
            LayerScores(layer=layer.layer, key=scored(row, layer.layer, "key"), value=scored(row, layer.layer, "value"))
            for row, layer in enumerate(inventory.geometry.scored)
        ),
    )


def _stderr(numbers: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single number."""
    return stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0


def _why_unsupported(model: PreTrainedModel, formats: Formats, calibration: CalibrationSet) -> str | None:
    """Return why this model's attention cannot be asked, or None; some models show it only while they run."""
    layers = {layer for layer, _ in formats}
    ids = torch.tensor([calibration.sequences[0][:2]], device=input_device(model))
    try:
        with torch.no_grad(), attention_through(model, layers, AttentionCall.run):
            model(input_ids=ids, use_cache=False)
    except UnsupportedAttention as error:
        return f"no loss is predicted: {first_line(error)}"
    return None


def _remarks(calibration: CalibrationSet, settings: SensitivitySettings, resumed: int, scores: Scores) -> Iterator[str]:
    measured = scores.calibration.sequences if scores.calibration is not None else 0
    if resumed:
        yield f"went on with a stopped run: {resumed} of {len(calibration.sequences)} sequences were measured before"
    if measured < len(calibration.sequences):
        yield f"stable after {measured} of {len(calibration.sequences)} sequences: the others were not needed"
    yield from calibration.remarks(settings.sequences)
    if measured == 1:
        yield "a single sequence has no standard error: it is written as 0"
