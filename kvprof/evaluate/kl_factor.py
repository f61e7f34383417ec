"""How do the measured KL of whole plans and their predicted one compare? One factor, fitted and kept with the scores.

Reads a model, plans with their predictions, and the Scores that predicted them; measures on the text, suffix and window
that the scores speak of; writes the factor into the Scores file, and a journal while it runs, so that a stopped run
goes on. Does not know how a plan was predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from kvprof import __version__
from kvprof.calibration.again import read_again, recognise
from kvprof.calibration.mixture import MixedText, TextRequest, mix_texts
from kvprof.calibration.self_generated import fill
from kvprof.calibration.sequences import CalibrationSet, choose_length
from kvprof.calibration.text import BUILTIN
from kvprof.errors import InvalidFile, KvprofError, Mismatch, UsageError
from kvprof.evaluate.logits import Route, choose_route, planned_logits, reference_logits
from kvprof.metrics import LOGIT_ROUNDING_NATS, token_kl
from kvprof.models.config import load_config
from kvprof.models.decoder import text_config
from kvprof.models.identity import fingerprint_of
from kvprof.models.inventory import position_limit, take_inventory
from kvprof.models.load import load_model, load_tokenizer, wider_dtype_advice
from kvprof.models.source import ModelSource
from kvprof.records.audit import PlanCheck, PredictedPlan
from kvprof.records.formats import TENSORS
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import tokens_read_as_codes
from kvprof.records.requests.check import CalibrateRequest
from kvprof.records.scores import KlCalibration, Scores, suffix_start
from kvprof.records.words import counted
from kvprof.storage.journal import Journal

USUAL_FRACTION = 0.5
"""The share of each sequence, at its end, that counts where the scores do not say."""


@dataclass(frozen=True)
class CalibrateRun:
    """A finished run: what was found, the scores that hold it now, their file, each plan's numbers, and remarks."""

    found: KlCalibration
    scores: Scores
    path: Path
    plans: tuple[PlanCheck, ...]
    remarks: tuple[str, ...]


def run_calibrate(
    source: ModelSource,
    scores: Scores,
    path: Path,
    plans: Sequence[PredictedPlan],
    request: CalibrateRequest,
    folder: Path,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    writing: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrateRun:
    """Load a model, measure plans, and write the Scores file again with the factor between prediction and measurement.

    A plan's window gives way to that of the scores, for which its loss was predicted. Where the scores know each
    sequence's own loss and their text can be read again, a plan is held against the same sequences' prediction, so that
    text that happens to be hard changes nothing.
    path: of the scores. folder: for the journal of finished forwards. progress: called with (forwards done, in all);
    writing: with (tokens done, in all) of text that the model writes itself first.
    Raises KvprofError in its many kinds; Mismatch where a plan or the scores are for another model.
    """
    config = load_config(source)
    geometry = take_inventory(config, source.id).geometry
    _check_fit(plans, scores, geometry)
    asked = _as_scored(plans, scores)
    readings, tokenizer = _read_text(source, text_config(config), scores, request)
    fraction = USUAL_FRACTION if scores.decoding is None else scores.decoding.suffix_fraction
    _check_something_is_read(asked, max(max(reading.lengths) for reading in readings))
    model = load_model(source, request.dtype, request.device)
    fingerprint = fingerprint_of(model, geometry, source)
    _check_fit(asked, scores, geometry, fingerprint)
    text, same = _fill(readings, scores, lambda reading: fill(reading, model, tokenizer, fingerprint, writing))
    text = text.first(request.sequences)
    route = choose_route(model, asked[0].plan, text.sequences[0][:2], exact=False)
    dtype = str(model.dtype).removeprefix("torch.")
    identity = {
        "model": source.id,
        "model fingerprint": fingerprint,
        "dtype": dtype,
        "kvprof version": __version__,
        **text.identity,
        "suffix_fraction": fraction,
        "path": route,
    }
    with Journal(folder / "calibrate.journal", identity, restart) as log:
        resumed = _measure(model, asked, text, fraction, route, log, progress)
        measured = [_found(log, plan, len(text.sequences)) for plan in asked]
        checks = [_check(plan, numbers, text, same) for plan, numbers in zip(asked, measured, strict=True)]
        found = fit(checks, len(text.sequences))
        if Scores.load(path).digest != scores.digest:
            raise Mismatch(f"{path} was measured anew in the meantime, and is left as it is.\n  Calibrate again.")
        calibrated = scores.model_copy(update={"kl_calibration": found})
        calibrated.save(path)
        log.remove()
    remarks = _remarks(plans, asked, scores, text, same, request, dtype, measured, resumed)
    return CalibrateRun(found, calibrated, path, tuple(checks), tuple(remarks))


def fit(plans: Sequence[PlanCheck], sequences: int) -> KlCalibration:
    """Return the factor that makes the least of the squared logarithms of measured over predicted KL.

    Raises InvalidFile, naming the plan, where one has no ratio.
    """
    logs = []
    for plan in plans:
        if plan.ratio is None:
            what = "is predicted to cost nothing" if not plan.predicted_kl_nats else "measured no difference at all"
            raise InvalidFile(f"{plan.name} {what}, which gives no ratio.\n  Calibrate by plans of fewer bits.")
        logs.append(math.log(plan.ratio))
    mean = fmean(logs)
    return KlCalibration(
        factor=math.exp(mean),
        plans=len(plans),
        sequences=sequences,
        spread=math.exp(max(abs(log - mean) for log in logs)),
    )


def _as_scored(plans: Sequence[PredictedPlan], scores: Scores) -> list[PredictedPlan]:
    """Return the plans with the window that the scores speak of, each recipe once."""
    if not plans:
        raise UsageError("there is no plan to calibrate by.\n  Name one, or leave out all and let kvprof make some.")
    window = None if scores.decoding is None else scores.decoding.window
    found: dict[str, PredictedPlan] = {}
    for one in plans:
        plan = one.plan if window is None else one.plan.model_copy(update={"window": window})
        found.setdefault(plan.recipe, replace(one, plan=plan))
    return list(found.values())


def _read_text(
    source: ModelSource, config: PretrainedConfig, scores: Scores, request: CalibrateRequest
) -> tuple[tuple[MixedText, ...], Any]:
    """Return the ways to read the text that the scores were measured on, and the tokenizer.

    Scores that do not say what they read get the built-in text.
    """
    positions = position_limit(config)
    tokenizer = load_tokenizer(source)
    readings: tuple[MixedText, ...]
    if scores.calibration is None:
        length = choose_length(None, positions)
        readings = (mix_texts(TextRequest([BUILTIN], request.sequences, length), tokenizer),)
    else:
        choose_length(scores.calibration.sequence_length, positions)
        readings = read_again(scores.calibration, tokenizer)
    for reading in readings:
        reading.check_vocabulary(config.vocab_size)
    return readings, tokenizer


def _fill(
    readings: Sequence[MixedText], scores: Scores, write: Callable[[MixedText], CalibrationSet]
) -> tuple[CalibrationSet, bool]:
    """Return the text, and whether it is known to be what the scores were measured on."""
    if scores.calibration is None:
        return write(readings[0]), False
    return recognise(scores.calibration, readings, write)


def _measure(
    model: PreTrainedModel,
    plans: Sequence[PredictedPlan],
    text: CalibrationSet,
    fraction: float,
    route: Route,
    log: Journal,
    progress: Callable[[int, int], None],
) -> int:
    """Measure what the journal lacks; one forward in full precision serves all plans. Return how much it had."""
    todo = {index: [one for one in plans if _key(one, index) not in log.done] for index in range(len(text.sequences))}
    total = len(plans) * len(text.sequences)
    resumed = done = total - sum(map(len, todo.values()))
    log.check_numbers()
    progress(done, total)
    for index, missing in todo.items():
        if not missing:
            continue
        ids = text.sequences[index]
        first = suffix_start(len(ids), fraction)
        reference = reference_logits(model, ids, first)
        for one in missing:
            planned = planned_logits(model, one.plan, ids, route, first).to(reference.device)
            kl = float(token_kl(reference, planned).mean())
            if not math.isfinite(kl):
                dtype = str(model.dtype).removeprefix("torch.")
                advice = wider_dtype_advice(model, "the weights are damaged, or the text drives it out of range")
                raise KvprofError(f"the logits are not finite in {dtype}.\n  {advice}")
            log.add(_key(one, index), kl)
            done += 1
            progress(done, total)
    return resumed


def _key(one: PredictedPlan, index: int) -> str:
    return f"{one.plan.recipe} {index}"


def _found(log: Journal, one: PredictedPlan, sequences: int) -> list[float]:
    return [float(log.done[_key(one, index)]) for index in range(sequences)]


def _check(one: PredictedPlan, measured: Sequence[float], text: CalibrationSet, same: bool) -> PlanCheck:
    """Return a plan's two numbers, the predicted one of the same sequences where that is known."""
    number = len(measured)
    predicted = fmean(one.samples[:number]) if same and one.samples is not None else one.predicted_nats
    split = f" ({text.info.split})" if text.info.split else ""
    return PlanCheck(
        name=one.name,
        digest=one.plan.digest,
        stored_bits=one.stored_bits,
        predicted_kl_nats=predicted,
        measured_kl_nats=fmean(measured),
        measured_kl_stderr_nats=stdev(measured) / math.sqrt(number) if number > 1 else None,
        text=text.info.dataset + split,
    )


def _check_fit(
    plans: Sequence[PredictedPlan], scores: Scores, geometry: CacheGeometry, fingerprint: str | None = None
) -> None:
    """Raise Mismatch where the scores or a plan, then named, are for another model."""
    scores.check_fits(geometry, fingerprint)
    for one in plans:
        try:
            one.plan.check_fits(geometry, fingerprint)
        except Mismatch as error:
            raise Mismatch(f"{one.name}: {error}") from None


def _check_something_is_read(plans: Sequence[PredictedPlan], longest: int) -> None:
    """Raise UsageError where the longest sequence stays within a plan's window."""
    for one in plans:
        forms = [entry.tensor(tensor) for entry in one.plan.layers for tensor in TENSORS]
        if not any(tokens_read_as_codes(form, one.plan.window, longest - 1) for form in forms):
            raise UsageError(
                f"{one.name}: in {longest} tokens no query reads anything quantized, so there is nothing to measure.\n"
                "  Name a plan that quantizes, or measure scores with a larger --sequence-length."
            )


def _remarks(
    plans: Sequence[PredictedPlan],
    asked: Sequence[PredictedPlan],
    scores: Scores,
    text: CalibrationSet,
    same: bool,
    request: CalibrateRequest,
    dtype: str,
    measured: Sequence[Sequence[float]],
    resumed: int,
) -> Iterator[str]:
    sequences = len(text.sequences)
    if resumed:
        yield f"went on with a stopped run: {resumed} of {len(asked) * sequences} forwards were done before"
    yield from text.about_text()
    if len(asked) < len(plans):
        yield f"{len(plans) - len(asked)} of the {len(plans)} plans store what another one does, and count once"
    window = None if scores.decoding is None else scores.decoding.window
    if window is not None and any(one.plan.window != window for one in plans):
        sinks = counted(window.sink_tokens, "sink")
        yield f"measured with {sinks} and a window of {window.recent_tokens}, as the scores were, whatever a plan has"
    if sequences < request.sequences:
        yield f"the scores were measured on {sequences} sequences: on all of them, not {request.sequences}"
    if scores.calibration is None:
        yield f"the scores do not say which text they were measured on: calibrated on {text.info.dataset}"
    elif not same:
        yield "the text is not what the scores were measured on, or has changed since: compared with their means"
    noise = LOGIT_ROUNDING_NATS.get(dtype, 0.0)
    least = min(fmean(numbers) for numbers in measured)
    if least < 10 * noise:
        yield f"in {dtype}, logits are rounded by as much as a KL of {noise:g}: try --dtype float32"
