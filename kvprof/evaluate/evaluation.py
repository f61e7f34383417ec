"""How far does a plan's cache move the model's predictions on held-out text? Measured beside its rivals.

Reads a model, text and plans; writes evaluation.json, and a journal while it runs, so that a stopped run goes on. Every
number compares logits with those of the same model, its cache in full precision. Does not know how a plan or a rival
was made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvprof import __version__
from kvprof.calibration.sequences import CalibrationSet, tokenize
from kvprof.calibration.text import BUILTIN, open_text
from kvprof.errors import CalibrationError, KvprofError, Mismatch, UsageError
from kvprof.evaluate.logits import Route, choose_route, planned_logits, reference_logits
from kvprof.evaluate.metrics import token_kl, token_nll, top1_agreement
from kvprof.evaluate.summary import SequenceResult, perplexity, summarise
from kvprof.models.identity import checkpoint_fingerprint, live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.load import ModelSource, load_config, load_model, load_tokenizer
from kvprof.records.evaluation import Evaluation, Role
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan
from kvprof.records.runs import Journal

USUAL_LENGTH = 512
"""Tokens of a sequence, where nothing else is said."""

FINALISTS = 2
"""Of a rival's candidates, how many go on after the first sequence."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure on, and how.

    split: None is held-out for the built-in text, else as `open_text` has it. sequence_length: None is USUAL_LENGTH, or
    what the model was made for where that is less. measure_from: the first position that counts; those before it are
    only read. dtype, device: as `models.load.load_model` takes them. exact: token by token through the packed cache.
    """

    data: str = BUILTIN
    split: str | None = None
    sequences: int = 12
    sequence_length: int | None = None
    measure_from: int = 0
    seed: int = 0
    pack: bool = False
    dtype: str = "auto"
    device: str = "auto"
    exact: bool = False


@dataclass(frozen=True)
class Rival:
    """A plan to compare with, or the best of several.

    candidates: of more than one, all are measured on the first sequence and the best FINALISTS on every sequence; the
    one with the least mean KL is reported. Choosing on the text itself can only flatter the rival.
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


def run_evaluation(
    source: ModelSource,
    plan: BitPlan,
    settings: EvaluationSettings,
    folder: Path,
    rivals: Sequence[Rival] = (),
    against: Sequence[tuple[str, BitPlan]] = (),
    name: str = "plan",
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationRun:
    """Load a model, measure a plan, its rivals and further plans on text, and write evaluation.json.

    against: further plans with their names. name: of the plan itself. folder: for the result, and for the journal of
    finished pieces meanwhile. progress: called with (forwards done, forwards in all).
    Raises KvprofError in its many kinds; Mismatch where a plan is for another model.
    """
    whole_config = load_config(source)
    inventory = take_inventory(whole_config, source.id)
    geometry = inventory.geometry
    config = whole_config.get_text_config(decoder=True)
    length = _sequence_length(settings, getattr(config, "max_position_embeddings", None))
    entrants = [
        _Entrant(name, "plan", (plan,)),
        *(_Entrant(rival.name, "rival", rival.candidates) for rival in rivals),
        *(_Entrant(label, "against", (other,)) for label, other in against),
    ]
    _check_fit(entrants, geometry)  # shapes differ without a look at the weights
    split = settings.split or ("held-out" if settings.data == BUILTIN else None)
    text = tokenize(
        open_text(settings.data, split, settings.seed),
        load_tokenizer(source),
        settings.sequences,
        length,
        settings.seed,
        settings.pack,
    )
    chosen = _long_enough(text, settings.measure_from)
    largest = max(max(ids) for ids in text.sequences)
    if largest >= config.vocab_size:
        raise CalibrationError(
            f"the tokenizer writes token {largest}, but the model's vocabulary has {config.vocab_size}."
        )
    model = load_model(source, settings.dtype, settings.device)
    fingerprint = live_fingerprint(model, geometry) or checkpoint_fingerprint(source, geometry)
    _check_fit(entrants, geometry, fingerprint)
    route = choose_route(model, plan, text.sequences[chosen[0]][:2], settings.exact)
    dtype = str(model.dtype).removeprefix("torch.")
    identity = {
        "model": source.id,
        "model fingerprint": fingerprint,
        "dtype": dtype,
        "kvprof version": __version__,
        **{
            ("text fingerprint" if field == "fingerprint" else field): value
            for field, value in text.info.model_dump(mode="json").items()
        },
        "measure_from": settings.measure_from,
        "path": route,
    }
    with Journal(folder / "evaluation.journal", identity, restart) as log:
        resumed = len(log.done)
        pieces = _Pieces(model, text, settings.measure_from, route, log)
        finalists = _measure(pieces, chosen, entrants, progress)
        results = [pieces.results(candidate, chosen) for _, candidate in finalists]
        evaluation = Evaluation(
            kvprof_version=__version__,
            model=inventory.model.model_copy(update={"fingerprint": fingerprint}),
            dtype=dtype,
            text=text.info,
            path=route,
            measured_from=settings.measure_from,
            reference_perplexity=perplexity(*pieces.reference(chosen)),
            plans=tuple(
                summarise(label, entrant.role, candidate, geometry, result, results[0], settings.measure_from)
                for label, (entrant, candidate), result in zip(_names(finalists), finalists, results, strict=True)
            ),
        )
        written = evaluation.save(folder / "evaluation.json")
        log.remove()
    return EvaluationRun(evaluation, written, tuple(_remarks(text, len(chosen), settings, resumed)))


class _Pieces:
    """One plan on one sequence at a time, each measured once and kept in the journal.

    Plans that store the same in the same way share their pieces, whatever they are called and wherever they come from.
    """

    def __init__(
        self, model: PreTrainedModel, text: CalibrationSet, measure_from: int, route: Route, log: Journal
    ) -> None:
        self._model, self._text, self._from, self._route, self._log = model, text, measure_from, route, log

    def keys(self, plans: Iterable[BitPlan], index: int) -> dict[str, BitPlan | None]:
        """Return the journal's key of each piece of a sequence with its plan; None is full precision."""
        return {f"reference {index}": None, **{f"{_recipe(plan)} {index}": plan for plan in plans}}

    def has(self, key: str) -> bool:
        """Whether a piece is measured."""
        return key in self._log.done

    def measure(self, plans: Sequence[BitPlan], index: int, finished: Callable[[], None]) -> None:
        """Measure what is missing of a sequence; one forward in full precision serves all plans."""
        missing = {key: plan for key, plan in self.keys(plans, index).items() if not self.has(key)}
        if not missing:
            return
        ids, start = self._text.sequences[index], self._from
        reference = reference_logits(self._model, ids)[start:]
        targets = torch.tensor(ids[start + 1 :], device=reference.device)
        for key, plan in missing.items():
            if plan is None:
                nll = float(token_nll(reference[:-1], targets).sum())
                result: dict[str, object] = {"nll_nats": nll}
                finite = math.isfinite(nll)
            else:
                planned = planned_logits(self._model, plan, ids, self._route)[start:].to(reference.device)
                kl, nll = token_kl(reference, planned), float(token_nll(planned[:-1], targets).sum())
                agrees = top1_agreement(reference, planned).int().tolist()
                result = {"kl_nats": kl.tolist(), "agrees": agrees, "nll_nats": nll}
                finite = math.isfinite(nll) and bool(kl.isfinite().all())
            if not finite:
                raise KvprofError(_overflow_advice(self._model, "full precision" if plan is None else "the plan"))
            self._log.add(key, result)
            finished()

    def mean_kl(self, plan: BitPlan, indices: Sequence[int]) -> float:
        """Return a plan's mean KL over some sequences."""
        numbers = [kl for result in self.results(plan, indices) for kl in result.kl_nats]
        return math.fsum(numbers) / len(numbers)

    def results(self, plan: BitPlan, indices: Sequence[int]) -> list[SequenceResult]:
        """Return what was measured of a plan on each sequence."""
        found = [self._log.done[f"{_recipe(plan)} {index}"] for index in indices]
        return [SequenceResult(tuple(one["kl_nats"]), tuple(one["agrees"]), one["nll_nats"]) for one in found]

    def reference(self, indices: Sequence[int]) -> tuple[list[float], list[int]]:
        """Return each sequence's negative log likelihood in full precision, and its number of targets."""
        nll = [self._log.done[f"reference {index}"]["nll_nats"] for index in indices]
        return nll, [len(self._text.sequences[index]) - self._from - 1 for index in indices]


def _measure(
    pieces: _Pieces, indices: Sequence[int], entrants: Sequence[_Entrant], progress: Callable[[int, int], None]
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


def _best(pieces: _Pieces, entrant: _Entrant, indices: Sequence[int], number: int) -> _Entrant:
    """Return an entrant with the candidates of least mean KL over some sequences, ascending."""
    ranked = sorted(entrant.candidates, key=lambda plan: pieces.mean_kl(plan, indices))
    return replace(entrant, candidates=tuple(ranked[:number]))


def _plans(entrants: Sequence[_Entrant]) -> list[BitPlan]:
    return [plan for entrant in entrants for plan in entrant.candidates]


def _recipe(plan: BitPlan) -> str:
    """Return a hash of what a plan stores and how; not of its name, its model or its history."""
    fields = plan.model_dump(mode="json", include={"quantizer", "window", "layers"})
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _names(finalists: Sequence[tuple[_Entrant, BitPlan]]) -> list[str]:
    """Return a name for each line of the results, no two alike."""
    names: list[str] = []
    for entrant, plan in finalists:
        label = name = entrant.name + _pair(plan) * (entrant.role == "rival")
        number = 1
        while name in names:
            number += 1
            name = f"{label} ({number})"
        names.append(name)
    return names


def _pair(plan: BitPlan) -> str:
    """Return ` int3g32/int2g32` for a plan that has one format for all keys and one for all values, else nothing."""
    pairs = {(entry.key.name, entry.value.name) for entry in plan.layers}
    return " " + "/".join(pairs.pop()) if len(pairs) == 1 else ""


def _check_fit(entrants: Sequence[_Entrant], geometry: CacheGeometry, fingerprint: str | None = None) -> None:
    """Raise Mismatch, naming the plan, where one is for another model."""
    for entrant in entrants:
        for plan in entrant.candidates:
            try:
                plan.check_fits(geometry, fingerprint)
            except Mismatch as error:
                raise Mismatch(f"{entrant.name}: {error}") from None


def _sequence_length(settings: EvaluationSettings, positions: int | None) -> int:
    """Return the length to cut sequences to, for a model made for so many positions (None: no limit)."""
    asked = settings.sequence_length
    length = min(USUAL_LENGTH, positions or USUAL_LENGTH) if asked is None else asked
    if length > (positions or length):
        raise UsageError(f"--sequence-length {length}: the model was made for {positions}.\n  Try {positions}.")
    if length >= 2 and not 0 <= settings.measure_from <= length - 2:
        raise UsageError(
            f"--measure-from {settings.measure_from}: a sequence of {length} tokens has its last target "
            f"at position {length - 2}."
        )
    return length


def _long_enough(text: CalibrationSet, measure_from: int) -> list[int]:
    """Return the sequences that have a target from `measure_from` on."""
    chosen = [index for index, ids in enumerate(text.sequences) if len(ids) >= measure_from + 2]
    if not chosen:
        raise CalibrationError(
            f"no sequence reaches position {measure_from}, where measuring was to begin.\n"
            "  Lower --measure-from, or add --pack to join rows."
        )
    return chosen


def _remarks(text: CalibrationSet, measured: int, settings: EvaluationSettings, resumed: int) -> Iterator[str]:
    found = len(text.sequences)
    if resumed:
        yield f"went on with a stopped run: {resumed} forwards were measured before"
    if text.skipped:
        yield f"skipped {text.skipped} rows too short to have a target"
    if found < settings.sequences:
        yield f"the text holds only {found} of the {settings.sequences} sequences asked for"
    if measured < found:
        yield f"{found - measured} of {found} sequences end before position {settings.measure_from}: not measured"


def _overflow_advice(model: PreTrainedModel, what: str) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    advice = {
        "float16": "Use --dtype bfloat16 (the same range as float32) or --dtype float32.",
        "bfloat16": "Use --dtype float32.",
    }.get(dtype, "No wider dtype would help: the model's weights are damaged, or the text drives it out of range.")
    return f"the logits of {what} are not finite in {dtype}.\n  {advice}"
