"""The newest result files, and the newest scores."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.records.scores import LOSS_INCREASE, METRICS, Scores
from kvprof.storage.folders import OUTPUTS


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Return the files among paths, the last changed first; those of equal times in the order in which they come."""
    return sorted(filter(Path.is_file, paths), key=lambda path: -path.stat().st_mtime_ns)


def newest_scores(metric: str | None = None, outputs: Path = OUTPUTS) -> tuple[Path, Scores]:
    """Find the newest Scores file in the output folders, of those that have the metric where one is named; read it.

    Where none is named, its folder's scores with `loss_increase` are preferred to newer ones of the same model without;
    a measured divergence, often a sample of formats, serves only where its folder has nothing else. A broken file is
    passed over where another serves. Raises InvalidFile, saying what to run or what is broken, where none does;
    UsageError for a metric that cannot be allocated by.
    """
    if metric is not None and metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}: {did_you_mean(metric, METRICS)}")
    names = ("norms", "gradients", "divergence")
    broken: InvalidFile | None = None
    best: tuple[Path, Scores] | None = None
    for path in newest_first(path for name in names for path in outputs.glob(f"*/{name}.json")):
        if best is not None and path.parent != best[0].parent:
            continue
        try:
            scores = Scores.load(path)
        except InvalidFile as error:
            broken = broken or error
            continue
        if not scores.metrics or metric not in (None, *scores.metrics):
            continue
        if best is None or (_rank(path, scores) > _rank(*best) and _may_be_alike(scores, best[1])):
            best = path, scores
        if _rank(*best) == (True, True):
            break
    if best is not None:
        return best
    if broken is not None:
        raise broken
    wanted = f"scores with {metric}" if metric else "scores"
    makers = ["`kvprof norms`"] * (metric in (None, "spectral_norm", "frobenius_norm"))
    makers += ["`kvprof gradients`"] * (metric in (None, "gradient_norm", LOSS_INCREASE))
    raise InvalidFile(f"no {wanted} in {outputs}/.\n  Run {' or '.join(makers)} first, or name a file with --scores.")


def scores_for(target: str, outputs: Path = OUTPUTS) -> tuple[Path, Scores]:
    """Find the newest scores that were measured for a runtime, else the newest that `newest_scores` finds; read them.

    What is measured for a runtime lies in a folder of its name, within the model's.
    """
    broken: InvalidFile | None = None
    for path in newest_first(outputs.glob(f"*/{target}/gradients.json")):
        try:
            scores = Scores.load(path)
        except InvalidFile as error:
            broken = broken or error
            continue
        if LOSS_INCREASE in scores.metrics:
            return path, scores
    try:
        return newest_scores(LOSS_INCREASE, outputs)
    except InvalidFile:
        if broken is not None:
            raise broken from None
        raise


def _rank(path: Path, scores: Scores) -> tuple[bool, bool]:
    """Return what makes scores of one folder preferable to newer ones."""
    return path.stem != "divergence", LOSS_INCREASE in scores.metrics


def _may_be_alike(one: Scores, other: Scores) -> bool:
    """Whether nothing says that two files are of different models."""
    prints = [scores.model.fingerprint if scores.model else None for scores in (one, other)]
    return None in prints or prints[0] == prints[1]
