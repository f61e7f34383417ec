"""What a report on one model reads: the files in its folder, the newest of each kind, all of the same model.

Finds and reads JSON files; does not know what a report says of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from kvprof.errors import InvalidFile, KvprofError, Mismatch, first_line
from kvprof.records.audit import Audit
from kvprof.records.document import Document, ModelInfo
from kvprof.records.evaluation import Evaluation
from kvprof.records.formats import TENSORS
from kvprof.records.frontier import Frontier
from kvprof.records.geometry import CacheGeometry, check_same_model
from kvprof.records.inventory import Inventory
from kvprof.records.kinds import load_any
from kvprof.records.plan import BitPlan
from kvprof.records.scores import LOSS_INCREASE, Scores
from kvprof.records.spectra import Spectra
from kvprof.records.words import short_digest
from kvprof.storage.folders import OUTPUTS, slug
from kvprof.workspace.discovery import newest_first

T = TypeVar("T", bound=Document)

OURS = ("norms", "gradients", "divergence", "spectra", "plan", "frontier", "evaluation", "audit", "benchmark")
"""What the names of our files begin with: one of these that cannot be read is worth a remark."""
NORMS = ("spectral_norm", "frobenius_norm")


@dataclass(frozen=True)
class Found(Generic[T]):
    """A document and the file that it was read from."""

    path: Path
    document: T


@dataclass(frozen=True)
class ReportFiles:
    """What is known of one model; None where no file says it."""

    folder: Path
    model: ModelInfo
    geometry: CacheGeometry | None
    inventory: Inventory | None
    """From the model's config, where that could be read."""
    norms: Found[Scores] | None
    spectra: Found[Spectra] | None
    gradients: Found[Scores] | None
    losses: Found[Scores] | None
    """Scores with `loss_increase`: those that the plan was made from, where they are there; else the newest."""
    plan: Found[BitPlan] | None
    frontier: Found[Frontier] | None
    evaluation: Found[Evaluation] | None
    """That of the plan where there is one, else the newest."""
    more_evaluations: tuple[Found[Evaluation], ...]
    """Others whose numbers can stand beside it: same text, same positions, same dtype."""
    audit: Found[Audit] | None
    remarks: tuple[str, ...]

    @property
    def all(self) -> tuple[Found[Any], ...]:
        """Every file that was taken, each once."""
        taken = (self.norms, self.spectra, self.gradients, self.losses, self.plan, self.frontier, self.evaluation)
        found = [*taken, *self.more_evaluations, self.audit]
        return tuple({each.path: each for each in found if each is not None}.values())

    def with_inventory(self, inventory: Inventory | None) -> ReportFiles:
        """Return the files with what the model's config says, where that is of the same shapes; else with a remark."""
        if inventory is None:
            return self
        try:
            check_same_model("files' model", self.model, self.geometry, inventory.geometry)
        except Mismatch as error:
            remark = f"the model that is now at {self.model.id} is another one, and was not asked: {first_line(error)}"
            return replace(self, remarks=(*self.remarks, remark))
        return replace(self, inventory=inventory, geometry=inventory.geometry)


def folder_of(model: str | None, named: Sequence[Path] = (), outputs: Path = OUTPUTS) -> Path:
    """Return the folder that holds a model's files: that of its id in the outputs.

    model: as a command takes it, or the folder itself. None: the model that a named file is of, whose folder is else
    that file's; without one the folder with the newest file of ours, or the demo model's where there is none.
    """
    if model == "demo":
        return outputs / model
    if model is None and named:
        infos = (_info(_shown(path)) for path in named)
        known = (outputs / slug(info.id) for info in infos if info is not None and info.id is not None)
        return next(filter(Path.is_dir, known), named[0].parent)
    if model is None:
        files = newest_first(file for name in OURS for file in outputs.glob(f"*/{name}*.json"))
        return files[0].parent if files else outputs / "demo"
    path = Path(os.path.expanduser(model))
    if holds_files(path):
        return path
    return outputs / slug(str(path.resolve()) if os.path.exists(path) else model)


def holds_files(path: Path) -> bool:
    """Whether a folder holds files of ours, and is no model."""
    if not os.path.isdir(path) or (path / "config.json").is_file():
        return False
    return any(file.is_file() for name in OURS for file in path.glob(f"{name}*.json"))


def gather(folder: Path, named: Sequence[Path] = (), inventory: Inventory | None = None) -> ReportFiles:
    """Read the JSON files of a folder and choose those that a report is made of.

    named: files to take rather than the newest of their kind. inventory: of the model at hand; its shapes, and the
    named files, say which model this is; of what is left, the fingerprint that most files of the model's id have. What
    is of another model, or cannot be read, is passed over with a remark.
    Raises InvalidFile for a named file that cannot be read or no report shows, Mismatch for one of another model.
    """
    remarks: list[str] = []
    first = [Found(path, _shown(path)) for path in named]
    rest = _read_all(folder, {path.resolve() for path in named}, remarks)
    try:
        model, geometry = _which_model(first, rest, inventory)
    except InvalidFile as error:
        raise InvalidFile("\n  ".join([f"{folder}/: {error}", *remarks])) from None
    for each in first:
        problem = _misfit(each.document, model, geometry, is_named=True)
        if problem is not None:
            raise Mismatch(f"{each.path} is not of the model that this report is about: {problem}")
    fitting = []
    for each in rest:
        problem = _misfit(each.document, model, geometry)
        if problem is None:
            fitting.append(each)
        else:
            remarks.append(f"passed over {each.path}: {problem}")
    return _choose(folder, model, geometry, inventory, first, fitting, remarks)


def _shown(path: Path) -> Document:
    document = load_any(path)
    if not isinstance(document, Scores | Spectra | BitPlan | Frontier | Evaluation | Audit):
        raise InvalidFile(f"{path}: a report shows no file of schema {document.kind!r}.\n  kvprof show prints it.")
    return document


def _read_all(folder: Path, without: set[Path], remarks: list[str]) -> list[Found[Any]]:
    """Return every file of ours in a folder, the newest first; leave a remark where one cannot be read."""
    found = []
    for path in newest_first(path for path in sorted(folder.glob("*.json")) if path.resolve() not in without):
        try:
            document = load_any(path)
        except KvprofError as error:
            if path.stem.startswith(OURS):
                remarks.append(f"passed over {first_line(error)}")
            continue
        if isinstance(document, Scores) and document.shard is not None:
            remarks.append(f"passed over {path}: a part of scores; kvprof merge adds the parts up")
        elif isinstance(document, Scores | Spectra | BitPlan | Frontier | Evaluation | Audit):
            found.append(Found(path, document))
    return found


def _which_model(
    first: Sequence[Found[Any]], rest: Sequence[Found[Any]], inventory: Inventory | None
) -> tuple[ModelInfo, CacheGeometry | None]:
    """Return the model that a report is about; of no files and no inventory there is none, and InvalidFile says so."""
    shape = None if inventory is None else inventory.geometry
    candidates = list(first) or [each for each in rest if _misfit(each.document, None, shape) is None]
    infos = [info for each in candidates if (info := _info(each.document)) is not None]
    prints = Counter(info.fingerprint for info in infos if info.fingerprint is not None)
    wanted = None if inventory is None else inventory.model.id
    own = Counter(info.fingerprint for info in infos if info.fingerprint is not None and info.id == wanted)
    fingerprint = max(prints, key=lambda each: (own[each], prints[each]), default=None)  # of equals, the newest
    same = [info for info in infos if fingerprint is None or info.fingerprint == fingerprint]
    if shape is None:
        alike = (each.document for each in candidates if _info(each.document) in [None, *same])
        shapes = Counter(found for document in alike if (found := getattr(document, "geometry", None)) is not None)
        shape = max(shapes, key=lambda each: shapes[each], default=None)
    if inventory is not None:
        return inventory.model.model_copy(update={"fingerprint": fingerprint}), shape
    if same:
        named = next((info for info in same if info.id is not None), same[0])
        return named, shape
    for each in candidates:  # written by hand, and silent about the model
        if isinstance(each.document, Scores):
            return ModelInfo(num_layers=each.document.layers[-1].layer + 1), shape
    raise InvalidFile("there is nothing to report on: no file says anything of a model.")


def _info(document: Document) -> ModelInfo | None:
    info = getattr(document, "model", None)
    return info if isinstance(info, ModelInfo) else None


def _misfit(
    document: Document, model: ModelInfo | None, geometry: CacheGeometry | None, is_named: bool = False
) -> str | None:
    """Return why a file is not of a model, in a sentence; None where nothing says that it is not."""
    info = _info(document)
    if info is not None and model is not None:
        prints = (info.fingerprint, model.fingerprint)
        if None not in prints and prints[0] != prints[1]:
            return f"it is of another model ({info.id or 'unnamed'}, fingerprint {short_digest(info.fingerprint)})."
        if None in prints and None not in (info.id, model.id) and info.id != model.id and not is_named:
            return f"it is of the model {info.id}, and has no fingerprint that says it is the same."
        if info.num_layers != model.num_layers:
            return f"it is of a model of {info.num_layers} layers, not {model.num_layers}."
    if geometry is None:
        return None
    own = getattr(document, "geometry", None)
    try:
        check_same_model("file", info, own, geometry)
    except Mismatch as error:
        return first_line(error)
    layers = [entry.layer for entry in getattr(document, "layers", ())]
    if isinstance(document, Scores) and own is None and layers != [layer.layer for layer in geometry.scored]:
        return f"it scores {len(layers)} layers, where this model has {len(geometry.scored)} with projections."
    if isinstance(document, BitPlan) and (problem := document.misfit(geometry)):
        return f"{problem}."
    return None


def _choose(
    folder: Path,
    model: ModelInfo,
    geometry: CacheGeometry | None,
    inventory: Inventory | None,
    first: Sequence[Found[Any]],
    rest: Sequence[Found[Any]],
    remarks: Sequence[str],
) -> ReportFiles:
    """Take the first of each kind: named ones come before what belongs to the plan, newer ones before older."""
    files = [*first, *rest]
    scores = _of(files, Scores)
    plan = next(iter(_of(files, BitPlan)), None)
    measured = [each for each in scores if each.document.source != "divergence"]
    losses = [each for each in measured if _has_losses(each.document)]
    of_plan = [each for each in losses if plan is not None and each.document.digest == plan.document.scores_digest]
    named_losses = [each for each in losses if each in first]
    evaluations = _of(files, Evaluation)
    digest = None if plan is None else plan.document.digest
    its_own = [each for each in evaluations if each.document.plan.digest == digest]
    evaluation = next(iter([*_of(first, Evaluation), *its_own, *evaluations]), None)
    return ReportFiles(
        folder=folder,
        model=model,
        geometry=geometry,
        inventory=inventory,
        norms=_first(measured, lambda found: any(metric in found.metrics for metric in NORMS)),
        spectra=next(iter(_of(files, Spectra)), None),
        gradients=_first(measured, lambda found: "gradient_norm" in found.metrics),
        losses=next(iter([*named_losses, *of_plan, *losses]), None),
        plan=plan,
        frontier=next(iter(_of(files, Frontier)), None),
        evaluation=evaluation,
        more_evaluations=tuple(
            each for each in evaluations if evaluation is not None and each != evaluation and _alike(each, evaluation)
        ),
        audit=next(iter(_of(files, Audit)), None),
        remarks=tuple(remarks),
    )


def _of(files: Iterable[Found[Any]], kind: type[T]) -> list[Found[T]]:
    return [each for each in files if isinstance(each.document, kind)]


def _first(files: Iterable[Found[Scores]], fits: Callable[[Scores], bool]) -> Found[Scores] | None:
    return next((each for each in files if fits(each.document)), None)


def _has_losses(scores: Scores) -> bool:
    return any(entry.tensor(tensor).has(LOSS_INCREASE) for entry in scores.layers for tensor in TENSORS)


def _alike(one: Found[Evaluation], other: Found[Evaluation]) -> bool:
    """Whether two evaluations measured the same tokens in the same way."""

    def setting(evaluation: Evaluation) -> tuple[object, ...]:
        return evaluation.text, evaluation.measured_from, evaluation.dtype, evaluation.path

    return setting(one.document) == setting(other.document)
