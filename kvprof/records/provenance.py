"""What a plan was made from: its Scores file, found again by digest.

Reads a plan's provenance and the JSON files that may be its scores; does not know what is in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvprof.errors import InvalidFile, KvprofError, UsageError
from kvprof.records.files import newest_scores
from kvprof.records.plan import BitPlan
from kvprof.records.runs import OUTPUTS
from kvprof.records.scores import LOSS_INCREASE, Scores
from kvprof.records.words import short_digest


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
    found = [
        (file, scores)
        for file in dict.fromkeys([*outputs.glob("*/*.json"), *outputs.glob("*.json"), *path.parent.glob("*.json")])
        if file.is_file() and (scores := _scores_of(file, plan.scores_digest)) is not None
    ]
    if found:
        return max(found, key=lambda pair: _rank(*pair))
    raise InvalidFile(
        f"the scores that {path} was made from are not beside it, nor in {outputs}/ "
        f"({short_digest(plan.scores_digest)}).\n"
        "  They were measured anew or moved; name them, or others of the same model, with --scores FILE."
    )


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
