"""Any file of kvprof's, opened by what its `schema` field says it is."""

from __future__ import annotations

from pathlib import Path

from kvprof.errors import InvalidFile, did_you_mean
from kvprof.records.document import read_json, schema_of
from kvprof.records.plan import BitPlan
from kvprof.records.runs import OUTPUTS
from kvprof.records.scores import Scores

KINDS: dict[str, type[Scores] | type[BitPlan]] = {"scores": Scores, "plan": BitPlan}
"""The kinds of file by the word that `kvprof schema` takes."""


def load_any(path: str | Path) -> Scores | BitPlan:
    """Read and validate a file of whatever kind it says it is; raises InvalidFile."""
    value = read_json(path)
    schema = schema_of(value, str(path))
    for kind in KINDS.values():
        if schema.rpartition("/")[0] == kind.kind.rpartition("/")[0]:
            return kind.from_json(value, str(path))
    known = [kind.kind for kind in KINDS.values()]
    raise InvalidFile(f"{path}: schema is {schema!r}, which is no file of kvprof's: {did_you_mean(schema, known)}")


def newest_scores(metric: str | None = None, outputs: Path = OUTPUTS) -> Path:
    """Return the newest Scores file in the output folders, of those that have the metric where one is named.

    Raises InvalidFile, saying what to run, where there is none.
    """
    files = sorted(outputs.glob("*/*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in files:
        if path.stem in ("norms", "gradients", "divergence") and (metric is None or metric in Scores.load(path).metrics):
            return path
    wanted = f"scores with {metric}" if metric else "scores"
    raise InvalidFile(
        f"no {wanted} in {outputs}/.\n  Run `kvprof norms` or `kvprof gradients` first, or name a file with --scores."
    )
