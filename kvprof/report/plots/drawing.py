"""Pictures asked for by name, by model or by file -> files, and a remark on each that there is nothing to draw of.

Reads records, writes PNG or SVG files. Does not know what a picture looks like.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvprof.errors import UsageError, did_you_mean
from kvprof.records.document import ModelInfo
from kvprof.records.requests.share import PlotRequest
from kvprof.report.plots.catalogue import PICTURES, Setting
from kvprof.report.plots.jobs import Evaluations, Job, evaluations_for, jobs_of_files, jobs_of_folder, model_folder
from kvprof.report.plots.style import FORMATS, NothingToDraw, Page, save_figure
from kvprof.storage.folders import OUTPUTS, slug
from kvprof.workspace.report_inputs import folder_of

FOLDER = "plots"
"""Where pictures go, beside the files that they show."""


def draw_pictures(
    request: PlotRequest, words: Sequence[str] = (), model: str | None = None, out: Path | None = None
) -> tuple[list[Path], list[str]]:
    """Draw what was asked for; return the pictures' files, and a remark on each file that could not be drawn.

    words: pictures by name, files to draw, in any order. model: as a command takes it, or the folder of its files; the
    newest in the outputs where there is none. out: a folder, or a file that ends in .png or .svg.
    With names, or files, or both (then the names say what of these files is drawn), all must be there; with neither,
    whatever the model's folder holds is drawn.
    Raises UsageError for a word that is no picture and no file, InvalidFile for a file that is missing or broken,
    naming the command that writes it, Mismatch for an evaluation of another model, NothingToDraw, MissingMatplotlib,
    OutputError.
    """
    kind = _kind(request, out)
    page = _page(request, kind)
    names, paths = _split(words)
    wanted = [picture for picture in PICTURES.values() if not names or picture.name in names]
    remarks: list[str] = []
    evaluations: Evaluations = []
    if paths:
        if model is not None:
            raise UsageError("--model says whose files to look for, and a file is named; leave out one of them.")
        jobs, evaluations = jobs_of_files(paths, wanted, named=bool(names))
    else:
        folder = model_folder(model)
        jobs = jobs_of_folder(folder, wanted, model, bool(names), remarks)
        out = out or folder / FOLDER
    if request.layers is not None and not any(job.picture.name == "spectra" for job in jobs):
        raise UsageError(
            "--layers chooses the panels of `spectra`, and there are none to draw.\n  Run `kvprof spectra`."
        )
    targets = _targets(jobs, out, kind)
    written = []
    for job, target in zip(jobs, targets, strict=True):
        measured = evaluations_for(job, evaluations, remarks)
        setting = Setting(page, job.path.stem, request.layers, measured)
        try:
            for suffix, figure in job.picture.draw(job.document, setting):
                written.append(save_figure(figure, target.with_name(f"{target.stem}{suffix}.{kind}")))
        except NothingToDraw as error:
            if names or paths:
                raise NothingToDraw(f"{job.path}: {error}") from None
            remarks.append(f"no picture of {job.path}: {error}")
    if not written:
        raise NothingToDraw("no file that was found holds anything to draw.\n  " + "\n  ".join(remarks))
    return written, list(dict.fromkeys(remarks))


def _kind(request: PlotRequest, out: Path | None) -> str:
    """Return png or svg: what was asked for, else what the file's name says."""
    if not _is_file(out):
        return request.kind or FORMATS[0]
    ending = str(out).rpartition(".")[2]
    if request.kind not in (None, ending):
        raise UsageError(f"--format {request.kind}, but --out {out} ends in .{ending}; leave out one of them.")
    return ending


def _page(request: PlotRequest, kind: str) -> Page:
    if request.dpi is not None and kind == "svg":
        raise UsageError("--dpi is for PNG: an SVG has no pixels; leave it out.")
    return Page(request.width) if request.dpi is None else Page(request.width, request.dpi)


def _is_file(out: Path | None) -> bool:
    return out is not None and out.suffix in [f".{kind}" for kind in FORMATS] and not out.is_dir()


def _split(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Tell names of pictures from files."""
    names, paths = [], []
    for word in dict.fromkeys(words):
        if word in PICTURES:
            names.append(word)
        elif "/" in word or os.sep in word or word.endswith(".json") or os.path.isfile(word):
            paths.append(Path(os.path.expanduser(word)))
        else:
            about = f"\n  A model is named with --model {word}." if folder_of(word).is_dir() else ""
            raise UsageError(f"no picture is called {word!r}, and no file: {did_you_mean(word, PICTURES)}{about}")
    return names, paths


def _targets(jobs: Sequence[Job], out: Path | None, kind: str) -> list[Path]:
    """Return where each picture goes, no two to the same place."""
    if out is not None and _is_file(out):
        if len(jobs) > 1:
            names = ", ".join(job.stem for job in jobs)
            raise UsageError(f"--out {out} is one file, but there are {len(jobs)} pictures: {names}; name a folder.")
        return [out]
    taken: dict[Path, Path] = {}
    for job in jobs:
        target = (_place(job) if out is None else out) / f"{job.stem}.{kind}"
        if target in taken:
            raise UsageError(
                f"{taken[target]} and {job.path} would both be drawn as {target}.\n  Draw them one by one, with --out."
            )
        taken[target] = job.path
    return list(taken)


def _place(job: Job) -> Path:
    """Return the folder beside a file in the outputs; of a file elsewhere, that of its model, as for every result."""
    if OUTPUTS.resolve() in job.path.resolve().parents:
        return job.path.parent / FOLDER
    model = getattr(job.document, "model", None)
    named = model.id if isinstance(model, ModelInfo) and model.id else job.path.stem
    return OUTPUTS / slug(named) / FOLDER
