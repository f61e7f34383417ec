"""The values of --data, `NAME` or `NAME:WEIGHT` -> which texts, and how much of each.

Reads words; looks at the disk only to tell a name from a weight. Does not know what is in a text.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from kvprof.calibration.text import BUILTIN, LOADERS, SELF, is_hub_dataset
from kvprof.errors import UsageError

USUAL_DATA = (BUILTIN, SELF)
"""Half and half, where nothing is named: text of one kind alone makes plans that are worse on other text."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Ingredient:
    """One text of a mix, and its weight among the others: sequences are taken in proportion to it."""

    name: str
    weight: Fraction = Fraction(1)


def parse_data(data: Sequence[str]) -> tuple[Ingredient, ...]:
    """Read the values of --data.

    What follows the last colon is a weight where it is a number: no text that kvprof reads has a name that ends so.
    Raises UsageError for a weight that is not above zero, or no number, and for a text that is named twice.
    """
    if not data:
        raise UsageError(f"--data names no text.\n  Try {BUILTIN}.")
    found: dict[str, Ingredient] = {}
    for value in data:
        ingredient = _parse(value)
        name = ingredient.name
        place = name if name in (BUILTIN, SELF) or is_hub_dataset(name) else os.path.realpath(os.path.expanduser(name))
        if place in found:
            raise UsageError(
                f"--data names {name} twice.\n  To take more of it than of other text, give it a weight: {name}:2"
            )
        found[place] = ingredient
    return tuple(found.values())


def exact_weight(number: float) -> Fraction:
    """Return a weight as it is written down, so that turns taken by it are the same on every reading."""
    return Fraction(repr(number))


def _parse(value: str) -> Ingredient:
    name, colon, tail = value.rpartition(":")
    if colon and _NUMBER.fullmatch(tail):
        ingredient = Ingredient(name, _weight(value, float(tail)))
    elif not colon or re.search(r"[\\/]", tail) or Path(value).suffix.lower() in LOADERS or os.path.exists(value):
        ingredient = Ingredient(value)  # a colon within a path is part of it
    else:
        raise UsageError(
            f"--data {value}: what follows the last colon is a weight, and {tail!r} is no number.\n"
            f"  Write it as in {name or BUILTIN}:2 or {name or BUILTIN}:0.5."
        )
    if not ingredient.name.strip():
        raise UsageError(f"--data {value!r} names no text.\n  Try {BUILTIN}.")
    return ingredient


def _weight(value: str, number: float) -> Fraction:
    if not 0 < number < math.inf:
        raise UsageError(
            f"--data {value}: a weight is a number above zero, such as 2 or 0.5.\n"
            "  To take none of a text, leave it out."
        )
    return exact_weight(number)
