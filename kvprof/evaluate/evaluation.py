"""How far does a plan's cache move the model's predictions on held-out text? Measured beside its baselines.

Reads a model, text and plans; writes evaluation.json, and a journal while it runs, so that a stopped run goes on. Every
number compares logits with those of the same model, its cache in full precision. Does not know how a plan or a baseline
was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from kvprof import __version__
from kvprof.calibration.mixture import MixedText, TextRequest, mix_texts
from kvprof.calibration.self_generated import batches_of, fill, streamable
from kvprof.calibration.sequences import CalibrationSet, choose_length
from kvprof.calibration.text import BUILTIN
from kvprof.errors import CalibrationError, Mismatch, UsageError
from kvprof.evaluate.cached_evaluation import Pieces
from kvprof.evaluate.logits import choose_route
from kvprof.evaluate.summary import perplexity, summarise
from kvprof.metrics import LOGIT_ROUNDING_NATS, SOFTMAXES
from kvprof.models.config import load_config, weight_bytes
from kvprof.models.costs import Passes, estimate_run
from kvprof.models.decoder import text_config
from kvprof.models.identity import checkpoint_fingerprint, fingerprint_of, made_with
from kvprof.models.inventory import position_limit, take_inventory
from kvprof.models.load import load_model, load_tokenizer
from kvprof.models.source import ModelSource
from kvprof.records.estimate import Estimate
from kvprof.records.evaluation import Evaluation, Role
from kvprof.records.formats import TENSORS
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, tokens_read_as_codes
from kvprof.records.requests.check import EvaluateRequest
from kvprof.storage.journal import Journal

BYTES_A_PIECE = 8 * 2**10
"""Of a plan on a sequence: its line in the journal."""
FINALISTS = 2
"""Of a baseline's candidates, how many go on after the first sequence."""


@dataclass(frozen=True)
class Baseline:
    """A plan to compare with, or the best of several.

    candidates: of more than one, all are measured on the first sequence and the best FINALISTS on every sequence; the
    one with the least mean KL is reported. Choosing on the text itself can only flatter the baseline.
    """

    name: str
    candidates: tuple[BitPlan, ...]


@dataclass(frozen=True)
class EvaluationRun:
    """A finished run: its results, the file they are in, and what a reader of them should know."""

    evaluation: Evaluation
    path: Path
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Entrant:
    """A plan, or candidates for one, that will be a line in the results."""

    name: str
    role: Role
    candidates: tuple[BitPlan, ...]


def check_request(
    source: ModelSource, plans: Sequence[tuple[str, BitPlan]], request: EvaluateRequest, compares: bool = False
) -> None:
    """Raise what `run_evaluation` would of these plans, named, and of the text: for who has baselines to measure first.

    compares: raise UsageError, too, where the first plan would be compared on text that never reads its codes.
    """
    config = load_config(source)
    geometry = take_inventory(config, source.id).geometry
    _check_fit(plans, geometry)
    mix, _ = _read_text(source, request, text_config(config))
    lengths = [mix.lengths[index] for index in _long_enough(mix.lengths, request.measure_from)]
    first = _first_reading(plans[0][1], max(lengths))
    if compares and first is None and not _is_lossless(plans[0][1]):
        raise UsageError(
            f"--check would compare nothing: {max(lengths)} tokens all stay within the plan's window, in full "
            "precision.\n  Raise --sequence-length, or plan a smaller window."
        )
    if any(plan.model.fingerprint is not None for _, plan in plans):
        _check_fit(plans, geometry, checkpoint_fingerprint(source, geometry))


def run_evaluation(
    source: ModelSource,
    plan: BitPlan,
    request: EvaluateRequest,
    folder: Path,
    rivals: Sequence[Baseline] = (),
    against: Sequence[tuple[str, BitPlan]] = (),
    name: str = "plan",
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    writing: Callable[[int, int], None] = lambda done, total: None,
    announce: Callable[[Estimate], None] = lambda estimate: None,
) -> EvaluationRun:
    """Load a model, measure a plan, its baselines and further plans on text, and write evaluation.json.

    against: further plans with their names. name: of the plan itself. folder: for the result, and for the journal of
    finished pieces meanwhile. progress: called with (forwards done, forwards in all); writing: with (tokens done,
    tokens in all) of text that the model writes itself first. announce: called before a weight is loaded; may raise, to
    stop.
    Raises KvprofError in its many kinds; Mismatch where a plan is for another model.
    """
    config = load_config(source)
    inventory = take_inventory(config, source.id)
    geometry = inventory.geometry
    entrants = [
        _Entrant(name, "plan", (plan,)),
        *(_Entrant(rival.name, "rival", rival.candidates) for rival in rivals),
        *(_Entrant(label, "against", (other,)) for label, other in against),
    ]
    plans = [(entrant.name, candidate) for entrant in entrants for candidate in entrant.candidates]
    _check_fit(plans, geometry)  # shapes differ without a look at the weights
    mix, tokenizer = _read_text(source, request, text_config(config))
    chosen = _long_enough(mix.lengths, request.measure_from)
    lengths = [mix.lengths[index] for index in chosen]
    announce(_estimate(source, config, request, lengths, entrants, batches_of(mix)).about(mix.about_text()))
    model = load_model(source, request.dtype, request.device, request.stream)
    fingerprint = fingerprint_of(model, geometry, source)
    _check_fit(plans, geometry, fingerprint)
    text = fill(mix, model, tokenizer, fingerprint, writing)
    route = choose_route(model, plan, text.sequences[chosen[0]][:2], request.exact)
    dtype = str(model.dtype).removeprefix("torch.")
    identity = {
        "model": source.id,
        "model fingerprint": fingerprint,
        "dtype": dtype,
        "kvprof version": __version__,
        **text.identity,
        "measure_from": request.measure_from,
        "path": route,
    }
    with Journal(folder / "evaluation.journal", identity, restart) as log:
        resumed = len(log.done)
        pieces = Pieces(model, text.sequences, request.measure_from, route, log)
        finalists = _measure(pieces, chosen, entrants, progress)
        results = [pieces.results(candidate, chosen) for _, candidate in finalists]
        evaluation = Evaluation(
            kvprof_version=__version__,
            model=inventory.model.model_copy(update={"fingerprint": fingerprint}),
            dtype=dtype,
            text=text.info,
            path=route,
            measured_from=request.measure_from,
            made_with=made_with(model),
            reference_perplexity=perplexity(*pieces.reference(chosen)),
            plans=tuple(
                summarise(label, entrant.role, candidate, geometry, result, results[0], request.measure_from)
                for label, (entrant, candidate), result in zip(_names(finalists), finalists, results, strict=True)
            ),
        )
        written = evaluation.save(folder / "evaluation.json")
        log.remove()
    remarks = (*_remarks(evaluation, text, len(chosen), request, resumed), *_dilution(plan, text, chosen, request))
    return EvaluationRun(evaluation, written, remarks)


def _estimate(
    source: ModelSource,
    config: PretrainedConfig,
    request: EvaluateRequest,
    lengths: Sequence[int],
    entrants: Sequence[_Entrant],
    written: Sequence[int],
) -> Estimate:
    """Return what a run will take: a forward in full precision, and one for each plan that is not left out before.

    written: of text that the model writes itself, the sequences of each batch.
    """
    usual = 1 + sum(min(len(entrant.candidates), FINALISTS) for entrant in entrants)
    first = 1 + sum(len(entrant.candidates) for entrant in entrants)
    forwards = usual + (first - usual) / len(lengths)
    return estimate_run(
        source,
        config,
        lengths,
        Passes(
            forwards=forwards * (max(lengths) if request.exact and request.stream else 1),
            softmaxes=SOFTMAXES * (forwards - 1),
            held=2,
        ),
        request.dtype,
        request.device,
        request.stream,
        written_bytes=round(BYTES_A_PIECE * forwards * len(lengths)),
        written=written,
    )


def _read_text(source: ModelSource, request: EvaluateRequest, config: PretrainedConfig) -> tuple[MixedText, Any]:
    """Return the text as a model of this config reads it, and the tokenizer.

    Raises UsageError for lengths that cannot be.
    """
    length = choose_length(request.sequence_length, position_limit(config))
    if length >= 2 and not 0 <= request.measure_from <= length - 2:
        raise UsageError(
            f"--measure-from {request.measure_from}: a sequence of {length} tokens has its last target "
            f"at position {length - 2}."
        )
    tokenizer = load_tokenizer(source)
    data = request.data or (BUILTIN,)
    if request.stream:
        data = streamable(data, request.sequences, length, weight_bytes(config, request.dtype))
    mix = mix_texts(TextRequest.of(request, data, length, usual_split="held-out"), tokenizer)
    mix.check_vocabulary(config.vocab_size)
    return mix, tokenizer


def _measure(
    pieces: Pieces, indices: Sequence[int], entrants: Sequence[_Entrant], progress: Callable[[int, int], None]
) -> list[tuple[_Entrant, BitPlan]]:
    """Measure every entrant on every sequence, candidates that lose on the first left out; return the best of each."""
    first, *rest = indices
    wanted = pieces.keys(_plans(entrants), first)
    expected = len(wanted) + len(rest) * (1 + sum(min(len(entrant.candidates), FINALISTS) for entrant in entrants))

    def finished() -> None:
        progress(sum(map(pieces.has, wanted)), expected)

    finished()
    pieces.measure(_plans(entrants), first, finished)
    left = [_best(pieces, entrant, [first], FINALISTS) for entrant in entrants]
    for index in rest:
        wanted |= pieces.keys(_plans(left), index)
    expected = len(wanted)
    for index in rest:
        pieces.measure(_plans(left), index, finished)
    finished()
    return [(entrant, _best(pieces, entrant, indices, 1).candidates[0]) for entrant in left]


def _best(pieces: Pieces, entrant: _Entrant, indices: Sequence[int], number: int) -> _Entrant:
    """Return an entrant with the candidates of least mean KL over some sequences, ascending."""
    ranked = sorted(entrant.candidates, key=lambda plan: pieces.mean_kl(plan, indices))
    return replace(entrant, candidates=tuple(ranked[:number]))


def _plans(entrants: Sequence[_Entrant]) -> list[BitPlan]:
    return [plan for entrant in entrants for plan in entrant.candidates]


def _names(finalists: Sequence[tuple[_Entrant, BitPlan]]) -> list[str]:
    """Return a name for each line of the results, no two alike."""
    names: list[str] = []
    for entrant, plan in finalists:
        label = name = entrant.name + (_pair(plan) if entrant.role == "rival" else "")
        number = 1
        while name in names:
            number += 1
            name = f"{label} ({number})"
        names.append(name)
    return names


def _pair(plan: BitPlan) -> str:
    """Return ` int3g32/int2g32` for one format of all keys and one of all values, unless another rule chose them."""
    if plan.solver is not None and plan.solver.method != "uniform":
        return ""
    pairs = {(entry.key.name, entry.value.name) for entry in plan.layers}
    return " " + "/".join(pairs.pop()) if len(pairs) == 1 else ""


def _check_fit(plans: Sequence[tuple[str, BitPlan]], geometry: CacheGeometry, fingerprint: str | None = None) -> None:
    """Raise Mismatch, naming the plan, where one is for another model."""
    for name, plan in plans:
        try:
            plan.check_fits(geometry, fingerprint)
        except Mismatch as error:
            raise Mismatch(f"{name}: {error}") from None


def _long_enough(lengths: Sequence[int], measure_from: int) -> list[int]:
    """Return the sequences that have a target from `measure_from` on."""
    chosen = [index for index, length in enumerate(lengths) if length >= measure_from + 2]
    if not chosen:
        raise CalibrationError(
            f"no sequence reaches position {measure_from}, where measuring was to begin.\n"
            "  Lower --measure-from, or add --pack to join rows."
        )
    return chosen


def _is_lossless(plan: BitPlan) -> bool:
    return all(entry.tensor(tensor).is_full for entry in plan.layers for tensor in TENSORS)


def _first_reading(plan: BitPlan, length: int) -> int | None:
    """Return the first position whose query reads anything quantized, of a sequence so long; None where none does."""
    forms = {entry.tensor(tensor) for entry in plan.layers for tensor in TENSORS}
    reads = (
        position
        for position in range(length)
        if any(tokens_read_as_codes(form, plan.window, position, form.recent_fraction) for form in forms)
    )
    return next(reads, None)


def _dilution(plan: BitPlan, text: CalibrationSet, chosen: Sequence[int], request: EvaluateRequest) -> Iterator[str]:
    """Say how much of what was measured could not differ from full precision, where that is most of it."""
    lengths = [len(text.sequences[index]) for index in chosen]
    first = _first_reading(plan, max(lengths))
    if _is_lossless(plan):
        yield "the plan quantizes nothing: it has 16 bits everywhere"
    elif first is None:
        yield (
            f"nothing was quantized: {max(lengths)} tokens all stay within the plan's window. "
            "Raise --sequence-length, or plan a smaller window"
        )
    else:
        measured = sum(length - request.measure_from for length in lengths)
        reading = sum(max(0, length - max(first, request.measure_from)) for length in lengths)
        if reading < measured / 2:
            yield (
                f"only {reading / measured:.0%} of the measured tokens read anything quantized, and the others dilute "
                f"every mean: --measure-from {first} leaves them out, a larger --sequence-length makes them few"
            )


def _remarks(
    evaluation: Evaluation, text: CalibrationSet, measured: int, request: EvaluateRequest, resumed: int
) -> Iterator[str]:
    found = len(text.sequences)
    if resumed:
        yield f"went on with a stopped run: {resumed} forwards were measured before"
    yield from text.remarks(request.sequences)
    if measured < found:
        yield f"{found - measured} of {found} sequences end before position {request.measure_from}: not measured"
    noise = LOGIT_ROUNDING_NATS["bfloat16"]
    if evaluation.dtype == "bfloat16" and evaluation.plan.kl_nats < 10 * noise:
        yield f"in bfloat16, logits are rounded by as much as a KL of {noise:g}: try --dtype float32 or float16"
