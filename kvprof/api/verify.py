"""A plan held against all that it was made from: its scores, and where a model is named, its weights and the text.

Reads files and, of a model, no more than is asked for; writes nothing. Without a model, torch is never loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from kvprof.analysis.recorded import read_request
from kvprof.analysis.verify import (
    compared,
    formats_compared,
    geometry_compared,
    solve_again,
    unknown,
    verify_command,
    verify_costs,
    verify_solution,
    verify_versions,
)
from kvprof.errors import InvalidFile, KvprofError, UsageError, first_line
from kvprof.records.plan import BitPlan
from kvprof.records.replies import Check, Verified
from kvprof.records.scores import CalibrationInfo, Scores
from kvprof.workspace.scores_of_plans import find_scores

if TYPE_CHECKING:
    from kvprof.models.source import ModelSource

TOLERANCE = 1e-3
"""Relative to a tensor's largest number of its kind; what two measurements on other threads, batches or devices may
differ by. kvprof/models/README.md, "Numbers repeat", says what was seen."""

SOLVED_FROM_SCORES = ("scores", "model of the scores", "predicted loss", "formats", "optimality")


def verify(
    plan: str | Path,
    model: str | None = None,
    scores: str | Path | None = None,
    measure: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
) -> Verified:
    """Compute again what a plan's file says, and compare; what cannot be checked is said with the reason.

    model: whose weights and text are to be read again; none by default. scores: the file that the plan was made from,
    found by its digest where none is named. measure: measure the scores anew, with what their file says of how they
    were measured. progress: called meanwhile with (sequences done, in all).
    trust_remote_code, tokenizer: as `models.load.resolve` takes them.
    Raises InvalidFile where the plan, or scores that are named, cannot be read; ModelError where the model cannot;
    UsageError for measuring without a model.
    """
    if measure and model is None:
        raise UsageError("--measure runs the model.\n  Name it with --model; the demo model is --model demo.")
    read = BitPlan.load(plan)
    checks = list(verify_costs(read))
    path, found, why = _scores(read, Path(plan), scores)
    if found is None:
        checks += [unknown(name, why) for name in SOLVED_FROM_SCORES]
    else:
        checks += verify_solution(read, found)
    checks += verify_command(read)
    checks += verify_versions(read, found)
    if model is None:
        checks += [unknown(name, "no model is named (--model)") for name in ("model", "calibration text")]
    else:
        from kvprof.models.load import resolve

        checks += _of_model(read, found, resolve(model, trust_remote_code, tokenizer), measure, progress)
    return Verified(file=str(plan), scores=None if path is None else str(path), model=model, checks=tuple(checks))


def _scores(plan: BitPlan, path: Path, named: str | Path | None) -> tuple[Path | None, Scores | None, str]:
    """Return the scores to hold a plan against and their file; without any, why there are none."""
    if named is not None:
        return Path(named), Scores.load(named), ""
    try:
        return *find_scores(plan, path), ""
    except InvalidFile as error:
        instead = _in_their_place(plan, path)
        return (None, None, f"{first_line(error)} (--scores)") if instead is None else (*instead, "")


def _in_their_place(plan: BitPlan, path: Path) -> tuple[Path, Scores] | None:
    """Return other scores that lie where those of a plan should: measured anew since, or altered."""
    metric = None if plan.solver is None else plan.solver.metric
    if plan.scores_digest is None or metric is None:
        return None
    named: str | None = None
    with contextlib.suppress(InvalidFile):
        named = read_request(plan).scores
    usual = "norms.json" if metric in ("spectral_norm", "frobenius_norm") else "gradients.json"
    file = path.parent / usual if named is None else Path(named)
    if not file.is_file():
        return None
    try:
        return file, Scores.load(file)
    except KvprofError:
        return None


def _of_model(
    plan: BitPlan, scores: Scores | None, source: ModelSource, measure: bool, progress: Callable[[int, int], None]
) -> Iterator[Check]:
    yield from _weights(plan, source)
    yield _text(scores, source)
    if scores is not None and scores.made_with is not None:
        yield from _libraries(scores)
    if measure:
        yield from _measured(plan, scores, source, progress)


def _libraries(scores: Scores) -> Iterator[Check]:
    assert scores.made_with is not None
    for name, version in scores.made_with.versions.items():
        yield compared(f"{name} of the scores", version, metadata.version(name))


def _weights(plan: BitPlan, source: ModelSource) -> Iterator[Check]:
    """Yield whether a checkpoint has the plan's shapes, and its fingerprint."""
    from kvprof.models.config import load_config
    from kvprof.models.identity import checkpoint_fingerprint
    from kvprof.models.inventory import take_inventory

    inventory = take_inventory(load_config(source), source.id)
    geometry = inventory.geometry
    misfit = plan.misfit(geometry)
    if misfit is not None:
        yield Check(name="model", status="differs", said=plan.model.id or "unnamed", found=source.id, note=misfit)
        return
    yield compared("model", plan.model.fingerprint, checkpoint_fingerprint(source, geometry))
    yield compared("architecture of the model", plan.model.architecture, inventory.model.architecture)
    yield geometry_compared("cache of the model", plan, geometry)


def _text(scores: Scores | None, source: ModelSource) -> Check:
    """Return whether the calibration text, read again, has the same tokens."""
    name = "calibration text"
    if scores is None:
        return unknown(name, "the scores, which name it, are not at hand")
    info = scores.calibration
    if info is None:
        return unknown(name, f"scores by {scores.source or 'hand'} read no text")
    if info.fingerprint is None:
        return unknown(name, "the scores carry no fingerprint of it")
    from kvprof.calibration.again import read_again
    from kvprof.models.load import load_tokenizer

    try:
        readings = read_again(info, load_tokenizer(source))
    except KvprofError as error:
        return unknown(name, first_line(error))
    if readings[0].to_write:
        return _but_for_its_own(name, info, [reading.drawn for reading in readings])
    found = [reading.complete().info.fingerprint for reading in readings]
    return compared(name, info.fingerprint, info.fingerprint if info.fingerprint in found else found[0])


def _but_for_its_own(
    name: str, info: CalibrationInfo, readings: list[tuple[tuple[int, tuple[int, ...] | None], ...]]
) -> Check:
    """Return whether all sequences are as they were but those that the model wrote itself."""
    from kvprof.calibration.sequences import fingerprint_of

    said = info.sequence_fingerprints
    if said is None:
        return unknown(name, "the model wrote a part of it, and single sequences have no fingerprints")
    prints = [[None if ids is None else fingerprint_of(ids) for _, ids in drawn] for drawn in readings]
    own = sum(one is None for one in prints[0])
    if own == len(said):
        return unknown(name, "the model wrote it (--measure lets it write again)")
    alike = [sum(one == other for one, other in zip(some, said, strict=False)) for some in prints]
    most, read = max(alike), len(said) - own
    note = f"the other {own} the model wrote itself (--measure lets it write again)"
    return Check(
        name=name,
        status="holds" if most == read else "differs",
        said=f"{read} sequences",
        found=f"{most} sequences the same",
        note=note,
    )


def _measured(
    plan: BitPlan, scores: Scores | None, source: ModelSource, progress: Callable[[int, int], None]
) -> Iterator[Check]:
    """Yield whether measuring again gives the scores to within TOLERANCE, and the same plan."""
    from kvprof.api.measure_again import largest_difference, measure_again

    names = ("scores measured again", "formats by them")
    if scores is None:
        for name in names:
            yield unknown(name, "the scores, which say how, are not at hand")
        return
    try:
        again = measure_again(scores, source, progress)
    except InvalidFile as error:
        for name in names:
            yield unknown(name, first_line(error))
        return
    if again.calibration is not None and scores.calibration is not None:
        yield compared("text measured on", scores.calibration.fingerprint, again.calibration.fingerprint)
    difference, where = largest_difference(scores, again)
    yield Check(
        name=names[0],
        status="holds" if difference <= TOLERANCE else "differs",
        said=f"within {TOLERANCE:g}",
        found=f"{difference:.2g}",
        note=where or None,
    )
    yield _planned_again(names[1], plan, again.model_copy(update={"kl_calibration": scores.kl_calibration}))


def _planned_again(name: str, plan: BitPlan, again: Scores) -> Check:
    try:
        request = read_request(plan)
        return formats_compared(name, plan, solve_again(plan, again, request))
    except KvprofError as error:
        return unknown(name, first_line(error))
