"""What runtimes with one choice for the whole cache have in common."""

from __future__ import annotations

from collections.abc import Callable

from kvprof.allocate.constraints import OneOfAll, pairs_of
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, skipped_remarks, told


def written(plan: BitPlan, target: Target, text: Callable[[str], str], suffix: str) -> Artefact:
    """Return what a runtime with one choice for the whole cache is given of a plan. text: of its word for a format."""
    found = told(plan, target)
    constraints = target.constraints
    assert isinstance(constraints, OneOfAll)
    pair = next(iter(pairs_of(found.assignment).values()))
    return Artefact(
        text(constraints.word_for(pair)),
        suffix,
        (*found.remarks, *skipped_remarks(plan, target, "makes no difference of them")),
    )
