"""How sensitive is each layer's cache, on calibration text? The two measurements that read text, in one resumable run.

Reads a model and calibration text; writes gradients.json, and a journal while it runs. Does not know how sequences are
scored (scoring.py), nor what the scores are spent on.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvprof import __version__
from kvprof.calibration.self_generated import fill
from kvprof.calibration.sequences import CalibrationSet
from kvprof.errors import UnsupportedAttention, UsageError, first_line
from kvprof.models.identity import fingerprint_of
from kvprof.models.load import input_device, load_model
from kvprof.models.source import ModelSource
from kvprof.profile.decoder import USUAL_DECODER, Decoder, Formats, decoding_of, within_the_window
from kvprof.profile.distributed import join_process_group
from kvprof.profile.preparation import Prepared, estimate, prepare
from kvprof.profile.scoring import SequenceResult, measure_sensitivity, samples_of
from kvprof.profile.shards import as_shard
from kvprof.records.effects import block_tokens, decode
from kvprof.records.estimate import Estimate
from kvprof.records.formats import TENSORS
from kvprof.records.geometry import CacheGeometry
from kvprof.records.inventory import Inventory
from kvprof.records.plan import tensor_word
from kvprof.records.requests.measure import GradientsRequest
from kvprof.records.sampled import gradient_scores
from kvprof.records.scores import Scores
from kvprof.runtime.attention.patch import AttentionCall, attention_through
from kvprof.storage.journal import Journal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SensitivityRun:
    """A finished run: its scores, the file they are in, and what a reader of them should know."""

    scores: Scores
    path: Path
    remarks: tuple[str, ...]


def run_sensitivity(
    source: ModelSource,
    request: GradientsRequest,
    folder: Path,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    writing: Callable[[int, int], None] = lambda done, total: None,
    is_enough: Callable[[Scores], bool] | None = None,
    check: Callable[[CacheGeometry, Formats], None] | None = None,
    announce: Callable[[Estimate], None] = lambda estimate: None,
    decoder: Decoder = USUAL_DECODER,
) -> SensitivityRun:
    """Load a model, measure it on calibration text and write gradients.json; go on where a stopped run was.

    Where several processes were launched, each measures a batch at a time, and the leading one alone writes. folder:
    for the result, and for the journal of finished batches meanwhile. progress: called with (sequences done, sequences
    in all); writing: with (tokens done, tokens in all) of text that the model writes itself first. is_enough: asked
    after FIRST_STAGE sequences and at each doubling; where it says so, the rest is left. check: called with the formats
    that will be scored, before anything is; may raise. announce: called before a weight is loaded; may raise, to stop.
    decoder: whose losses are predicted.
    Raises KvprofError in its many kinds: the model, the text, a setting or the journal is not fit.
    """
    group, device = join_process_group(request.device)
    prepared = group.each(lambda: prepare(source, request, decoder, is_enough is not None, check))
    share = prepared.share
    announce(group.each(lambda: estimate(prepared, device)))
    loaded = group.each(lambda: _load(prepared, device))
    text = group.first(lambda: fill(prepared.mix, loaded.model, prepared.tokenizer, loaded.fingerprint, writing))
    chosen = range(len(text.sequences)) if share is None else share.indices(len(text.sequences))
    identity = _identity(prepared, loaded, text)
    name = "gradients" if share is None else f"gradients-{share.number}-of-{share.of}"
    own = identity if share is None else identity | {"shard": str(share)}
    with contextlib.ExitStack() as stack:
        # The leading process alone keeps a journal: a run may go on as any number of processes.
        log = group.lead(lambda: stack.enter_context(Journal(folder / f"{name}.journal", own, restart)))
        counted = decoder.counted(text)
        measured = group.first(lambda: _read_journal(log, loaded, chosen, counted))
        resumed = len(measured)
        progress(len(measured), len(chosen))

        def finished(results: Mapping[int, SequenceResult]) -> None:
            if log is not None and not measured and len(results) < len(chosen):
                logger.info("%s", _first_numbers(results, text, loaded, decoder))
            if log is not None:
                entry = [[index, result.norms, result.effects] for index, result in results.items()]
                log.add(",".join(map(str, results)), entry)  # a batch is one line: all of it, or nothing
            measured.update(results)
            progress(len(measured), len(chosen))

        scores = measure_sensitivity(
            loaded.model,
            text,
            loaded.inventory,
            loaded.formats,
            decoder,
            request.batch_size,
            measured,
            finished,
            is_enough,
            chosen,
            group,
        )
        path = folder / f"{name}.json"
        if share is not None:
            samples = samples_of([measured[index] for index in chosen], loaded.inventory.geometry, loaded.formats)
            scores = as_shard(scores, samples, share, chosen, text.info, identity)
        if log is not None:
            scores = scores.calibrated_as(path)
            scores.save(path)
            log.remove()
    remarks = [remark for remark in (loaded.unsupported, loaded.unread) if remark]
    remarks += _remarks(text, prepared, loaded.formats, resumed, scores, is_enough)
    return SensitivityRun(scores, path, tuple(remarks))


@dataclass(frozen=True)
class _Loaded:
    """A model in memory, and what is known with it: which of the formats its attention can be asked for."""

    model: PreTrainedModel
    fingerprint: str
    inventory: Inventory
    formats: Formats
    unsupported: str | None
    unread: str | None


def _load(prepared: Prepared, device: str) -> _Loaded:
    request, formats, unread = prepared.request, prepared.formats, prepared.unread
    model = load_model(prepared.source, request.dtype, device, request.stream)
    geometry = prepared.inventory.geometry
    fingerprint = fingerprint_of(model, geometry, prepared.source)
    unsupported = _why_unsupported(model, geometry) if prepared.wanted else None
    if unsupported is not None:
        formats, unread = {}, None
    if prepared.decoder.formats is not None and prepared.wanted and not formats:
        # Asked for by name, and so not to be left out in silence.
        raise UsageError(str(unsupported or unread))
    stamped = prepared.inventory.model.model_copy(update={"fingerprint": fingerprint})
    inventory = prepared.inventory.model_copy(update={"model": stamped})
    return _Loaded(model, fingerprint, inventory, formats, unsupported, unread)


def _identity(prepared: Prepared, loaded: _Loaded, text: CalibrationSet) -> dict[str, Any]:
    """Return what a run that goes on with this one, or shards of it, must share."""
    decoder = prepared.decoder
    sliding = any(shape.window is not None for shape in prepared.inventory.geometry.layers)
    return {
        "model": prepared.source.id,
        "model fingerprint": loaded.fingerprint,
        "dtype": str(loaded.model.dtype),
        "kvprof version": __version__,
        **text.identity,
        "formats": _in_words(loaded.formats),
        **({"layers": decoder.layers} if sliding else {}),
        "window": decoder.window.model_dump(),
        "suffix fraction": decoder.suffix_fraction,
        "block tokens": block_tokens(max(decoder.counted(text))),
    }


def _read_journal(
    log: Journal | None, loaded: _Loaded, chosen: Sequence[int], counted: Sequence[int]
) -> dict[int, SequenceResult]:
    """Return the results of every sequence of a finished batch; raises InvalidFile for what no run has written.

    counted: positions that count of each sequence of the text.
    """
    assert log is not None
    block = block_tokens(max(counted))
    layers, effects = len(loaded.inventory.geometry.scored), sum(map(len, loaded.formats.values()))
    found: dict[int, SequenceResult] = {}
    with log.understood():
        for batch in log.done.values():
            if not (isinstance(batch, list) and batch):
                raise ValueError(batch)
            for index, norms, own in batch:
                result = SequenceResult(tuple((key, value) for key, value in norms), tuple(own))
                known = type(index) is int and index in chosen and index not in found
                fits = len(result.norms) == layers and len(result.effects) == effects
                if not (fits and known and all(map(_is_score, itertools.chain(*result.norms)))):
                    raise ValueError(index)
                blocks = -(-counted[index] // block)
                if any(len(decode(text)) != 1 + blocks for text in result.effects):
                    raise ValueError(index)
                found[index] = result
    return found


def _first_numbers(
    results: Mapping[int, SequenceResult], text: CalibrationSet, loaded: _Loaded, decoder: Decoder
) -> str:
    """Return in a line what the first sequences of a run say of the first format of keys and of values."""
    indices, geometry, counted = list(results), loaded.inventory.geometry, decoder.counted(text)
    scores = gradient_scores(
        samples_of(list(results.values()), geometry, loaded.formats),
        text.taken(indices).info,
        loaded.inventory.model,
        geometry,
        decoding_of(text.taken(indices), decoder.window, decoder.suffix_fraction) if loaded.formats else None,
        block_tokens(max(counted)),
        [counted[index] for index in indices],
    )
    said = []
    for tensor in TENSORS:
        what, unit = "by gradient norm", ""
        numbers = {entry.layer: entry.tensor(tensor).gradient_norm or 0.0 for entry in scores.layers}
        forms = [form.name for (_, name), several in loaded.formats.items() for form in several if name == tensor]
        if forms:
            what, unit = f"in {forms[0]}", " nats a token"
            losses = {entry.layer: entry.tensor(tensor).loss_increase or {} for entry in scores.layers}
            numbers = {layer: found[forms[0]] for layer, found in losses.items() if forms[0] in found}
        if not numbers:
            continue
        layer = max(numbers, key=numbers.__getitem__)
        word = tensor_word(geometry.layers[layer], tensor)
        said.append(f"{word}s {what} matter most in layer {layer}: {numbers[layer]:.3g}{unit}")
    sequences = "1 sequence" if len(indices) == 1 else f"{len(indices)} sequences"
    return f"first numbers, of {sequences}: {'; '.join(said)}"


def _is_score(number: object) -> bool:
    return type(number) is float and math.isfinite(number) and number >= 0


def _in_words(formats: Formats) -> list[str]:
    """Return `keys in int2g64, int4g64` and the like, each once: with the model's shapes, they say every layer's."""
    named = [f"{tensor}s in {', '.join(form.name for form in forms)}" for (_, tensor), forms in formats.items()]
    return list(dict.fromkeys(named))


def _why_unsupported(model: PreTrainedModel, geometry: CacheGeometry) -> str | None:
    """Return why this model's attention cannot be asked, or None; some models show it only while they run."""
    layers = {layer.layer for layer in geometry.planned}
    if not layers:
        return f"no loss is predicted: no plan gives bits to any layer ({geometry.reasons})"
    two_tokens = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    try:
        with torch.no_grad(), attention_through(model, layers, AttentionCall.run):
            model(input_ids=two_tokens, use_cache=False)
    except UnsupportedAttention as error:
        return f"no loss is predicted: {first_line(error)}"
    return None


def _remarks(
    calibration: CalibrationSet,
    prepared: Prepared,
    formats: Formats,
    resumed: int,
    scores: Scores,
    is_enough: Callable[[Scores], bool] | None,
) -> Iterator[str]:
    total = len(calibration.sequences)
    if prepared.share is not None:
        total = len(prepared.share.indices(total))
    measured = scores.calibration.sequences if scores.calibration is not None else 0
    if resumed:
        yield f"went on with a stopped run: {resumed} of {total} sequences were measured before"
    if measured < total:
        yield f"stable after {measured} of {total} sequences: the others were not needed"
    elif is_enough is not None:
        stable = bool(formats) and is_enough(scores)
        yield f"stable after all {total} sequences" if stable else f"not known to be stable after all {total} sequences"
    yield from calibration.remarks(prepared.request.most_sequences)
    forms = [form for several in formats.values() for form in several]
    if short := within_the_window(forms, prepared.decoder.window, [len(ids) for ids in calibration.sequences]):
        yield short
    if measured == 1:
        yield "a single sequence has no standard error: that of the gradient norms is written as 0"
