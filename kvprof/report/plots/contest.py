"""How measured plans are told apart in every picture: the plan a star, each rival a mark and a colour of its own.

Reads results of an Evaluation. Does not know where they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvprof.records.evaluation import PlanResult
from kvprof.report.plots.style import ACCENT, OTHER_MARKS, OTHERS


class Look(NamedTuple):
    """The marks of one plan."""

    mark: str
    colour: str
    edge: str
    size: float
    """Points."""
    is_star: bool
    """Whether it is the evaluated plan, which lies on top."""
    is_filled: bool
    """Of marks that stand alone: every other rival's is a ring, so that one is seen within another."""


def looks(results: Iterable[PlanResult]) -> Iterator[tuple[PlanResult, Look]]:
    """Yield each plan with its look; that of a rival depends on how many rivals come before it."""
    rivals = 0
    for result in results:
        if result.role == "plan":
            yield result, Look("*", ACCENT, "black", 9, is_star=True, is_filled=True)
            continue
        colour = OTHERS[rivals % len(OTHERS)]
        yield result, Look(OTHER_MARKS[rivals % len(OTHER_MARKS)], colour, colour, 5, False, rivals % 2 == 0)
        rivals += 1
