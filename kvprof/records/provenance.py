"""What a plan was made from: its Scores file, found again by digest.

Reads a plan's provenance and the JSON files that may be its scores; does not know what is in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from kvprof.errors import InvalidFile, KvprofError
from kvprof.records.document import LARGEST_FILE_BYTES
from kvprof.records.plan import BitPlan
from kvprof.records.runs import OUTPUTS
from kvprof.records.scores import LOSS_INCREASE, Scores


def find_scores(plan: BitPlan, path: Path, outputs: Path = OUTPUTS) -> tuple[Path, Scores]:
    """Find and read the scores that a plan was made from: in the folder of the plan's file, then in the outputs.

    path: where the plan was read from. Raises InvalidFile, saying what to do, where the plan names none or none is
    found.
    """
    digest = None if plan.provenance is None else plan.provenance.scores
    if digest is None:
        raise InvalidFile(
            f"{path} does not say which scores it was made from.\n  Name scores of its model with --scores FILE."
        )
    files = dict.fromkeys([*path.parent.glob("*.json"), *outputs.glob("*/*.json"), *outputs.glob("*.json")])
    candidates = [file for file in files if file.is_file()]
    # A file as kvprof wrote it is known by its bytes; one written by hand, or calibrated since, only by what it says.
    same_bytes = [file for file in candidates if _has_bytes(file, digest)]
    for file in [*same_bytes, *candidates]:
        try:
            scores = Scores.load(file)
        except KvprofError:
            continue
        if scores.digest == digest:
            return file, scores
    raise InvalidFile(
        f"the scores that {path} was made from are not beside it, nor in {outputs}/ ({digest[:19]}...).\n"
        "  They were measured anew or moved; name them, or others of the same model, with --scores FILE."
    )


def find_common_losses(plans: Mapping[Path, BitPlan], outputs: Path = OUTPUTS) -> Scores | None:
    """Find and read the scores with `loss_increase` that plans were made from; None where they name several or none.

    plans: by the file that each was read from. Those that name no scores, such as plans written by hand, go along.
    """
    named = {
        plan.provenance.scores: (plan, path)
        for path, plan in plans.items()
        if plan.provenance is not None and plan.provenance.scores is not None
    }
    if len(named) != 1:
        return None
    ((plan, path),) = named.values()
    try:
        _, scores = find_scores(plan, path, outputs)
    except InvalidFile:
        return None
    return scores if LOSS_INCREASE in scores.metrics else None


def _has_bytes(file: Path, digest: str) -> bool:
    try:
        small = file.stat().st_size <= LARGEST_FILE_BYTES
        return small and f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" == digest
    except OSError:
        return False
