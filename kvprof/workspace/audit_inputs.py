"""What an audit reads: a measured divergence, and the scores, plans and evaluations that lie beside it.

Finds and reads JSON files; does not compare them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvprof.errors import InvalidFile, KvprofError, first_line
from kvprof.records.evaluation import Evaluation
from kvprof.records.kinds import load_any
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores
from kvprof.storage.folders import OUTPUTS, slug
from kvprof.workspace.discovery import newest_first
from kvprof.workspace.names import short_names

OTHERS = ("gradients.json", "norms.json")
"""The scores that are looked for beside a divergence."""


@dataclass(frozen=True)
class AuditFiles:
    """All that an audit holds against each other, by name, and what could not be read."""

    path: Path
    """Of the divergence."""
    divergence: Scores
    scores: dict[str, Scores]
    plans: dict[str, BitPlan]
    evaluations: tuple[Evaluation, ...]
    remarks: tuple[str, ...]


def find_audit_files(
    divergence: Path | None = None,
    scores: Sequence[Path] = (),
    evaluations: Sequence[Path] = (),
    plans: Sequence[Path] = (),
    outputs: Path = OUTPUTS,
) -> AuditFiles:
    """Read a divergence and what is to be held against it.

    divergence: a file, or a folder that holds divergence.json; the newest in the output folders where none is named.
    scores: by default OTHERS beside it, else those of the same model where its results go. evaluations, plans: these,
    and every other one that lies beside the divergence.
    A file that nobody named and that cannot be read is passed over with a remark.
    Raises InvalidFile where a named file, or the divergence, cannot be read, or there is nothing to compare it with.
    """
    path = _divergence(divergence, outputs)
    measured = Scores.load(path)
    folder = path.parent
    remarks: list[str] = []
    found_scores: dict[str, Scores] = {}
    for file, name in zip(scores, short_names(scores), strict=True):
        found_scores[name] = Scores.load(file)
    if not scores:
        own = None if measured.model is None or measured.model.id is None else outputs / slug(measured.model.id)
        for name in OTHERS:
            places = [folder, *([] if own is None else [own])]
            for file in filter(Path.is_file, dict.fromkeys(place / name for place in places)):
                try:
                    read = Scores.load(file)
                except InvalidFile as error:
                    remarks.append(f"passed over: {first_line(error)}")
                    continue
                if file.parent == folder or _is_of(read, measured):
                    found_scores[file.stem] = read
                    break
    if not found_scores:
        raise InvalidFile(
            f"there is nothing to hold {path} against: no {' or '.join(OTHERS)} of its model.\n"
            "  Run `kvprof gradients` or `kvprof norms` first, or name files with --scores."
        )
    listed_plans = {file: BitPlan.load(file) for file in plans}
    listed_evaluations = {file.resolve(): Evaluation.load(file) for file in evaluations}
    named = {file.resolve() for file in (*plans, *evaluations)}
    for file in sorted(folder.glob("*.json")):
        if file.resolve() in named or not file.is_file():
            continue
        try:
            document = load_any(file)
        except KvprofError as error:
            if file.stem.startswith(("plan", "evaluation")):  # else it is likely none of ours
                remarks.append(f"passed over: {first_line(error)}")
            continue
        if isinstance(document, BitPlan):
            listed_plans[file] = document
        elif isinstance(document, Evaluation):
            listed_evaluations[file.resolve()] = document
    return AuditFiles(
        path=path,
        divergence=measured,
        scores=found_scores,
        plans=dict(zip(short_names(listed_plans), listed_plans.values(), strict=True)),
        evaluations=tuple(listed_evaluations.values()),
        remarks=tuple(remarks),
    )


def _is_of(scores: Scores, measured: Scores) -> bool:
    """Whether scores say that they are of the model that was measured."""
    prints = [each.model.fingerprint if each.model is not None else None for each in (scores, measured)]
    return None not in prints and prints[0] == prints[1]


def _divergence(path: Path | None, outputs: Path) -> Path:
    if path is not None:
        return path / "divergence.json" if path.is_dir() else path
    files = newest_first(outputs.glob("*/divergence.json"))
    if not files:
        raise InvalidFile(
            f"no measured divergence in {outputs}/.\n"
            "  Run `kvprof divergence` first (slow: --layers and --formats choose a sample), or name its file."
        )
    return files[0]
