"""What a recipe asks for that does not exist or does not go together: said before anything is measured.

Reads a recipe's tables, and asks the disk only whether a text is there. The record itself has seen to types and bounds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from kvprof.allocate.dispatch import check_request
from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.recipes.words import OWN_TEXTS
from kvprof.records.recipe import Plans, Recipe, Target
from kvprof.records.requests.plan import AllocateRequest
from kvprof.targets.registry import TARGETS
from kvprof.workspace.text_files import files_below, is_pattern


def check_recipe(recipe: Recipe, texts: dict[str, dict[str, Path | None]]) -> None:
    """Raise InvalidFile, naming the key, for what a command would refuse whatever is measured.

    texts: of each table that reads text, its texts' names, and the file that each is, if it is one.
    """
    for table, names in texts.items():
        for name, file in names.items():
            _check_text(f"{table}.data", name, file)
    for table, several in (("plans", recipe.plans), ("rivals", recipe.rivals)):
        for number, plans in enumerate(several):
            _check_limits(plans, f"{table}[{number}]")
    for number, target in enumerate(recipe.targets):
        place = f"targets[{number}]"
        if target.runtime not in TARGETS:
            raise InvalidFile(
                f"{place}.runtime: unknown target {target.runtime!r}: {did_you_mean(target.runtime, TARGETS)}"
            )
        if any(other.runtime == target.runtime for other in recipe.targets[:number]):
            raise InvalidFile(f"{place}.runtime: {target.runtime} stands twice; list its budgets in one table.")
        _check_limits(target, place)


def _check_text(place: str, name: str, file: Path | None) -> None:
    if file is not None and not files_below(file):
        what = "no file's name is like this" if is_pattern(str(file)) else "no such file, or a folder without files"
        raise InvalidFile(f"{place}: {file}: {what}. A path in a recipe is relative to the recipe's folder.")
    word, colon, weight = name.partition(":")
    is_own = file is None and word in OWN_TEXTS
    number = _number(weight if is_own else name.rpartition(":")[2])
    if colon and (is_own if number is None else not 0 < number < math.inf):  # any other's colon may be part of a path
        raise InvalidFile(f"{place}: {name}: a weight is a number above zero, such as 2 or 0.5.")
    nearest = did_you_mean(word, OWN_TEXTS)
    if file is None and "/" not in word and word not in OWN_TEXTS and nearest.startswith("did"):
        raise InvalidFile(f"{place}: unknown text {word!r}: {nearest}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_limits(asked: Plans | Target, place: str) -> None:
    """Raise for limits and options that `allocate` would refuse."""
    said = asked.model_dump(exclude_unset=True, exclude={"name", "scores", "budgets", "runtime"})
    target = asked.runtime if isinstance(asked, Target) else None
    for budget in asked.budgets or (None,):
        if budget is not None and not 0 < budget < math.inf:
            raise InvalidFile(f"{place}.budgets: a budget of {budget:g} bits stores nothing; try 2.5.")
        with _at(place):
            check_request(AllocateRequest.of({**said, "budget": budget, "target": target}))


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Say where in the recipe a value is that the library does not take."""
    try:
        yield
    except UsageError as error:
        raise InvalidFile(f"{place}: {error}") from None
