"""What there is to draw: pictures of named files, or of the files in a model's folder, and what is measured beside.

Finds and reads JSON files. Does not draw.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvprof.errors import InvalidFile, KvprofError, Mismatch, UsageError, did_you_mean, first_line
from kvprof.records.document import Document, ModelInfo, read_json
from kvprof.records.evaluation import Evaluation
from kvprof.records.kinds import load_any
from kvprof.records.scores import Scores
from kvprof.report.plots.catalogue import PICTURES, Picture
from kvprof.report.plots.style import NothingToDraw
from kvprof.storage.folders import OUTPUTS
from kvprof.workspace.report_inputs import folder_of, holds_files

EVALUATION = "evaluation.json"
"""What is measured of a frontier's model, beside it."""

Evaluations = Sequence[tuple[Path, Evaluation]]
"""Evaluations that were named, each with its file."""


@dataclass(frozen=True)
class Job:
    """One picture of one file."""

    picture: Picture
    path: Path
    document: Document

    @property
    def stem(self) -> str:
        """The name of the picture's file: that of the picture, or of a file of which there may be several."""
        name, stem = self.picture.name, self.path.stem
        if self.path.name == self.picture.file:
            return name
        return stem if stem == name or stem.startswith(f"{name}-") else f"{name}-{stem}"


def model_folder(model: str | None) -> Path:
    """Return the folder of a model's files; raises InvalidFile where there is none."""
    folder = folder_of(model)
    if folder.is_dir():
        return folder
    if model is None:
        raise InvalidFile(f"there is nothing to draw in {OUTPUTS}/.\n  Run `kvprof norms` first, or name a file.")
    known = sorted(path.name for path in OUTPUTS.glob("*") if path.is_dir())
    nearest = f"; {did_you_mean(model, known)}" if known else ""
    raise InvalidFile(
        f"nothing was measured of {model!r}: there is no folder {folder}{nearest}\n  Run `kvprof norms {model}` first."
    )


def jobs_of_files(paths: Sequence[Path], wanted: Sequence[Picture], named: bool) -> tuple[list[Job], Evaluations]:
    """Return what of these files is drawn, and the evaluations among them.

    named: whether the pictures were asked for by name, so that each must be drawn of one of the files.
    """
    jobs, evaluations = [], []
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name it with --model {path}.")
        document = load_any(path)
        if isinstance(document, Evaluation):
            evaluations.append((path, document))
        found = [Job(picture, path, document) for picture in wanted if picture.shows(document)]
        if not found and not named:
            raise NothingToDraw(f"{path} holds nothing that a picture shows: {_lacking(document)}.")
        jobs += found
    drawn = {job.picture.name for job in jobs}
    for picture in wanted if named else ():
        if picture.name not in drawn:
            raise InvalidFile(
                f"none of these files is what `{picture.name}` shows: {', '.join(map(str, paths))}.\n"
                f"  `{picture.command.format(model='')}` writes {picture.file}."
            )
    return sorted(jobs, key=lambda job: list(PICTURES).index(job.picture.name)), evaluations


def jobs_of_folder(
    folder: Path, wanted: Sequence[Picture], model: str | None, named: bool, remarks: list[str]
) -> list[Job]:
    """Return what is drawn of a model's folder; remark on what cannot be read.

    model: for advice on what to run. named: whether the pictures were asked for by name, so that all must be there.
    """
    read: dict[Path, Document | KvprofError | None] = {}
    jobs: list[Job] = []
    for picture in wanted:
        found = []
        for path in sorted(folder.glob(picture.file)):
            if path not in read:
                read[path] = _read(path)
            document = read[path]
            if isinstance(document, KvprofError):
                if named:
                    raise document
            elif document is not None and picture.shows(document):
                found.append(Job(picture, path, document))
        if named and not found:
            raise _absent(picture, folder, model, read)
        jobs += found
    remarks += [f"passed over {first_line(error)}" for error in read.values() if isinstance(error, KvprofError)]
    if not jobs:
        problem = "\n  ".join(["", *remarks, "Run `kvprof norms` or `kvprof gradients` first, or name a file."])
        raise InvalidFile(f"there is nothing to draw in {folder}/.{problem}")
    return jobs


def _read(path: Path) -> Document | KvprofError | None:
    """Read a file, or return what is wrong with it; None where it is another program's."""
    try:
        value = read_json(path)
        is_ours = isinstance(value, dict) and str(value.get("schema")).startswith("kvprof.")
        return load_any(path) if is_ours else None
    except KvprofError as error:
        return error


def _absent(picture: Picture, folder: Path, model: str | None, read: Mapping[Path, object]) -> InvalidFile:
    """Return the error of a named picture whose file is not there, or lacks what the picture shows."""
    is_plain = model is None or model == "demo" or holds_files(Path(os.path.expanduser(model)))
    command = picture.command.format(model="" if is_plain else f" {model}")
    path = folder / picture.file
    if path in read:
        needs = " and no ".join(picture.needs) or f"{picture.kind.kind} in it"
        return InvalidFile(f"{path} has no {needs}, so there is no `{picture.name}` to draw.\n  Run `{command}` again.")
    return InvalidFile(f"there is no {path}, which the picture `{picture.name}` shows.\n  Run `{command}` first.")


def _lacking(document: Document) -> str:
    if isinstance(document, Scores):
        return "no norms, gradients or losses"
    return f"a file of {document.kind}"


def evaluations_for(job: Job, named: Evaluations, remarks: list[str]) -> list[Evaluation]:
    """Return the evaluations that a frontier shows: those that were named, else the one beside its own file.

    Raises Mismatch where a named one is of another model; one that nobody named is left out with a remark.
    """
    if job.picture.name != "frontier":
        return []
    beside = job.path.parent / EVALUATION
    found: Sequence[tuple[Path, object]] = named
    if not named and beside.is_file():
        found = [(beside, _read(beside))]
    fitting = []
    for path, evaluation in found:
        if not isinstance(evaluation, Evaluation):
            remarks.append(f"passed over {first_line(evaluation) if isinstance(evaluation, KvprofError) else path}")
            continue
        problem = _difference(getattr(job.document, "model", None), evaluation.model)
        if problem is None:
            fitting.append(evaluation)
        elif named:
            raise Mismatch(f"{path} is not of the model of {job.path}: {problem}")
        else:
            remarks.append(f"left out of the frontier: {path} is of another model: {problem}")
    return fitting


def _difference(one: ModelInfo | None, other: ModelInfo) -> str | None:
    """Return how two models differ, in a sentence; None where nothing says that they do."""
    if one is None:
        return None
    for field in ("fingerprint", "num_layers"):
        own, its = getattr(one, field), getattr(other, field)
        if None not in (own, its) and own != its:
            return f"its {field} is {str(its)[:19]}, not {str(own)[:19]}."
    return None
