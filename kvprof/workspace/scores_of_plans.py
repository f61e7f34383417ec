"""What a plan was made from, and other scores of its model: Scores files, found again by digest or by name.

Reads a plan's provenance and the JSON files that may be such scores; does not know what is in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvprof.errors import InvalidFile, KvprofError, Mismatch, UsageError, first_line
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan
from kvprof.records.scores import LOSS_INCREASE, Scores
from kvprof.records.words import short_digest
from kvprof.storage.folders import OUTPUTS
from kvprof.workspace.discovery import newest_scores


def find_scores(plan: BitPlan, path: Path, outputs: Path = OUTPUTS) -> tuple[Path, Scores]:
    """Find and read the scores that a plan was made from: in the outputs, or in the folder of the plan's file.

    Of copies, a calibrated one is taken rather than one from before, and then one named as the command names it.
    path: where the plan was read from. Raises InvalidFile, saying what to do, where the plan names none or none is
    found.
    """
    if plan.scores_digest is None:
        raise InvalidFile(
            f"{path} does not say which scores it was made from.\n  Name scores of its model with --scores FILE."
        )
    # What is measured for a runtime lies in a folder of its name, within the model's.
    files = (*outputs.glob("*/*.json"), *outputs.glob("*/*/*.json"), *outputs.glob("*.json"))
    if found := _of_digest(plan.scores_digest, [*files, *path.parent.glob("*.json")]):
        return found
    raise InvalidFile(
        f"the scores that {path} was made from are not beside it, nor in {outputs}/ "
        f"({short_digest(plan.scores_digest)}).\n"
        "  They were measured anew or moved; name them, or others of the same model, with --scores FILE."
    )


def find_fitting(
    name: str,
    metrics: Sequence[str],
    plan: BitPlan,
    folders: Sequence[Path],
    geometry: CacheGeometry,
    fingerprint: str,
) -> tuple[tuple[Path, Scores] | None, str]:
    """Find scores of a plan's model in some folders: those that the plan was made from, else the first of a name.

    name: of the file, such as `norms.json`. metrics: that the scores must have. folders: the first that holds a file
    which fits is taken. geometry, fingerprint: of the model; a file of another one is passed over.
    Returns the file with its scores, or None; and why what was there did not do, in a sentence, "" where nothing was.
    """
    why = ""

    def fit(path: Path, scores: Scores) -> bool:
        nonlocal why
        try:
            scores.check_fits(geometry, fingerprint)
        except Mismatch as error:
            why = why or f"{path}: {first_line(error)}"
            return False
        if scores.shard is not None or not set(metrics) <= set(scores.metrics):
            why = why or f"{path} has no {', '.join(metrics)}"
            return False
        return True

    files = [file for folder in dict.fromkeys(folders) for file in sorted(folder.glob("*.json"))]
    own = None if plan.scores_digest is None else _of_digest(plan.scores_digest, files)
    if own is not None and set(metrics) <= set(own[1].metrics) and fit(*own):
        return own, why
    for path in dict.fromkeys(folder / name for folder in folders):
        if not path.is_file():
            continue
        try:
            scores = Scores.load(path)
        except InvalidFile as error:
            why = why or first_line(error)
            continue
        if fit(path, scores):
            return (path, scores), why
    return None, why


def scores_of_plans(plans: Mapping[Path, BitPlan]) -> tuple[Path, Scores]:
    """Find the scores that plans were made from, by digest; the newest with `loss_increase` where there are no plans.

    plans: by the file that each was read from. Those that name no scores, such as plans written by hand, go along.
    Raises UsageError where plans were made from different scores, InvalidFile where they are not found.
    """
    if not plans:
        return newest_scores(LOSS_INCREASE)
    named = {plan.scores_digest: path for path, plan in plans.items() if plan.scores_digest is not None}
    if len(named) > 1:
        first, second, *_ = named.values()
        raise UsageError(
            f"{first} and {second} were made from different scores.\n  Name those to use with --scores FILE."
        )
    path = next(iter([*named.values(), *plans]))
    return find_scores(plans[path], path)


def find_common_losses(plans: Mapping[Path, BitPlan]) -> Scores | None:
    """Return the scores of `scores_of_plans` where they have `loss_increase`; None where it finds none."""
    try:
        _, scores = scores_of_plans(plans)
    except (UsageError, InvalidFile):
        return None
    return scores if LOSS_INCREASE in scores.metrics else None


def _of_digest(digest: str, files: Iterable[Path]) -> tuple[Path, Scores] | None:
    """Return the file that holds the scores of a digest, of copies the preferable one; None where none does."""
    found = [
        (file, scores)
        for file in dict.fromkeys(files)
        if file.is_file() and (scores := _scores_of(file, digest)) is not None
    ]
    return max(found, key=lambda pair: _rank(*pair)) if found else None


def _scores_of(file: Path, digest: str) -> Scores | None:
    """Return the scores that a file holds, if they are those; by what they say, since they may be calibrated since."""
    try:
        scores = Scores.load(file)
    except KvprofError:
        return None
    return scores if scores.digest == digest else None


def _rank(file: Path, scores: Scores) -> tuple[bool, bool]:
    """Return what makes one of several copies preferable; of equals, the first found is taken."""
    return scores.kl_calibration is not None, file.name == f"{scores.source}.json"
