"""How sensitive is each layer's cache, on calibration text? The two measurements that read text, in one resumable run.

Reads a model and calibration text; writes gradients.json, and a journal while it runs. Does not know how sequences are
scored (scoring.py), nor what the scores are spent on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvprof import __version__
from kvprof.calibration.ingredients import USUAL_DATA
from kvprof.calibration.mix import mix_texts
from kvprof.calibration.self_text import fill
from kvprof.calibration.sequences import CALIBRATION_LENGTH, CalibrationSet, choose_length
from kvprof.errors import UnsupportedAttention, UsageError, first_line
from kvprof.models.identity import checkpoint_fingerprint, live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.load import ModelSource, input_device, load_config, load_model, load_tokenizer
from kvprof.profile.decoder import Decoder, Formats, formats_of, readable, within_the_window
from kvprof.profile.scoring import SequenceResult, measure_sensitivity
from kvprof.records.geometry import CacheGeometry
from kvprof.records.runs import Journal
from kvprof.records.scores import Scores
from kvprof.runtime.interception import AttentionCall, attention_through

USUAL_SEQUENCES = 8
SEQUENCES_UNTIL_STABLE = 32
"""The most, where a run stops as soon as its plans are stable."""


@dataclass(frozen=True)
class SensitivitySettings:
    """What to measure on, and how.

    data: sources of text with their weights, as `calibration.ingredients` reads them. sequence_length: None is
    CALIBRATION_LENGTH, or what the model was made for where that is less. dtype, device, stream: as
    `models.load.load_model` takes them. batch_size: sequences in one forward; changes no score.
    """

    data: tuple[str, ...] = USUAL_DATA
    split: str | None = None
    sequences: int = USUAL_SEQUENCES
    sequence_length: int | None = None
    batch_size: int = 1
    seed: int = 0
    pack: bool = False
    dtype: str = "auto"
    device: str = "auto"
    stream: bool = False
    decoder: Decoder = field(default_factory=Decoder)


@dataclass(frozen=True)
class SensitivityRun:
    """A finished run: its scores, the file they are in, and what a reader of them should know."""

    scores: Scores
    path: Path
    remarks: tuple[str, ...]


def run_sensitivity(
    source: ModelSource,
    settings: SensitivitySettings,
    folder: Path,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    writing: Callable[[int, int], None] = lambda done, total: None,
    is_enough: Callable[[Scores], bool] | None = None,
    check: Callable[[CacheGeometry, Formats], None] | None = None,
) -> SensitivityRun:
    """Load a model, measure it on calibration text and write gradients.json; go on where a stopped run was.

    folder: for the result, and for the journal of finished sequences meanwhile. progress: called with (sequences done,
    sequences in all); writing: with (tokens done, tokens in all) of text that the model writes itself first. is_enough:
    asked after FIRST_STAGE sequences and at each doubling; where it says so, the rest is left. check: called with the
    formats that will be scored, before anything is; may raise.
    Raises KvprofError in its many kinds: the model, the text, a setting or the journal is not fit.
    """
    if settings.batch_size < 1:
        raise UsageError(f"--batch-size {settings.batch_size}: at least 1 is needed.")
    whole_config = load_config(source)
    inventory = take_inventory(whole_config, source.id)
    formats = formats_of(inventory.geometry, settings.decoder)
    wanted = settings.decoder.formats is None or any(settings.decoder.formats.values())
    if is_enough is not None and not wanted:
        raise UsageError("--until-stable looks at plans, which need predicted losses.\n  Leave out --formats none.")
    config = whole_config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    length = choose_length(settings.sequence_length, positions, CALIBRATION_LENGTH)
    tokenizer = load_tokenizer(source)
    mix = mix_texts(settings.data, settings.split, tokenizer, settings.sequences, length, settings.seed, settings.pack)
    mix.check_vocabulary(config.vocab_size)
    formats, unread = readable(formats, settings.decoder, max(mix.lengths))
    if check is not None and formats:
        check(inventory.geometry, formats)
    model = load_model(source, settings.dtype, settings.device, settings.stream)
    fingerprint = live_fingerprint(model, inventory.geometry) or checkpoint_fingerprint(source, inventory.geometry)
    inventory = inventory.model_copy(update={"model": inventory.model.model_copy(update={"fingerprint": fingerprint})})
    unsupported = _why_unsupported(model, inventory.geometry) if wanted else None
    if unsupported is not None:
        formats, unread = {}, None
    if settings.decoder.formats is not None and wanted and not formats:
        # Asked for by name, and so not to be left out in silence.
        raise UsageError(str(unsupported or unread))
    calibration = fill(mix, model, tokenizer, fingerprint, writing)
    identity = {
        "model": source.id,
        "model fingerprint": fingerprint,
        "dtype": str(model.dtype),
        "kvprof version": __version__,
        **calibration.identity,
        "formats": _in_words(formats),
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
        path = folder / "gradients.json"
        scores = scores.calibrated_as(path)
        scores.save(path)
        log.remove()
    remarks = [remark for remark in (unsupported, unread) if remark]
    remarks += _remarks(calibration, settings, formats, len(done), scores, is_enough)
    return SensitivityRun(scores, path, tuple(remarks))


def _in_words(formats: Formats) -> list[str]:
    """Return `keys in int2g64, int4g64` and the like, each once: with the model's shapes, they say every layer's."""
    named = [f"{tensor}s in {', '.join(form.name for form in forms)}" for (_, tensor), forms in formats.items()]
    return list(dict.fromkeys(named))


def _from_json(entry: Any) -> SequenceResult:
    norms, losses = entry
    return SequenceResult(tuple((key, value) for key, value in norms), tuple(losses))


def _why_unsupported(model: PreTrainedModel, geometry: CacheGeometry) -> str | None:
    """Return why this model's attention cannot be asked, or None; some models show it only while they run."""
    layers = {layer.layer for layer in geometry.planned}
    if not layers:
        return f"no loss is predicted: no plan gives bits to any layer ({geometry.layers[0].skipped})"
    two_tokens = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    try:
        with torch.no_grad(), attention_through(model, layers, AttentionCall.run):
            model(input_ids=two_tokens, use_cache=False)
    except UnsupportedAttention as error:
        return f"no loss is predicted: {first_line(error)}"
    return None


def _remarks(
    calibration: CalibrationSet,
    settings: SensitivitySettings,
    formats: Formats,
    resumed: int,
    scores: Scores,
    is_enough: Callable[[Scores], bool] | None,
) -> Iterator[str]:
    total = len(calibration.sequences)
    measured = scores.calibration.sequences if scores.calibration is not None else 0
    if resumed:
        yield f"went on with a stopped run: {resumed} of {total} sequences were measured before"
    if measured < total:
        yield f"stable after {measured} of {total} sequences: the others were not needed"
    elif is_enough is not None:
        stable = bool(formats) and is_enough(scores)
        yield f"stable after all {total} sequences" if stable else f"not known to be stable after all {total} sequences"
    yield from calibration.remarks(settings.sequences)
    forms = [form for several in formats.values() for form in several]
    if short := within_the_window(forms, settings.decoder.window, [len(ids) for ids in calibration.sequences]):
        yield short
    if measured == 1:
        yield "a single sequence has no standard error: that of the gradient norms is written as 0"
