"""What runtimes with one choice for the whole cache have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvprof.allocate.constraints import OneOfAll, pairs_of
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, skipped_remarks, told

UNQUANTIZED = "16 bits"
"""Stands for a word that follows the model's dtype. `auto` would be another thing: a checkpoint's own FP8 cache."""


def written(
    plan: BitPlan,
    target: Target,
    text: Callable[[str], str],
    suffix: str,
    remarks: Callable[[str], Sequence[str]] = lambda word: (),
) -> Artefact:
    """Return what a runtime with one choice for the whole cache is given of a plan.

    text, remarks: of a word of its constraints, what is written and what to know of it.
    """
    found = told(plan, target)
    constraints = target.constraints
    assert isinstance(constraints, OneOfAll)
    word = constraints.word_for(next(iter(pairs_of(found.assignment).values())))
    skipped = skipped_remarks(plan, target, "makes no difference of them")
    return Artefact(text(word), suffix, (*found.remarks, *skipped, *remarks(word)))
