"""The kinds of file that kvprof writes, and any of them opened by what it says it is."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from kvprof.errors import InvalidFile, did_you_mean
from kvprof.records.audit import Audit
from kvprof.records.benchmark import Benchmark
from kvprof.records.document import read_json, schema_of
from kvprof.records.evaluation import Evaluation
from kvprof.records.frontier import Frontier
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores
from kvprof.records.spectra import Spectra

AnyFile: TypeAlias = Scores | BitPlan | Evaluation | Frontier | Audit | Benchmark | Spectra

KINDS: dict[str, type[AnyFile]] = {
    "scores": Scores,
    "plan": BitPlan,
    "evaluation": Evaluation,
    "frontier": Frontier,
    "audit": Audit,
    "benchmark": Benchmark,
    "spectra": Spectra,
}
"""The kinds of file by the word that `kvprof schema` takes."""


def load_any(path: str | Path) -> AnyFile:
    """Read and validate a file of whatever kind it says it is; raises InvalidFile."""
    value = read_json(path)
    schema = schema_of(value, str(path))
    for kind in KINDS.values():
        if schema.rpartition("/")[0] == kind.kind.rpartition("/")[0]:
            return kind.from_json(value, str(path))
    known = [kind.kind for kind in KINDS.values()]
    raise InvalidFile(f"{path}: schema is {schema[:60]!r}, which is no file of kvprof's: {did_you_mean(schema, known)}")
