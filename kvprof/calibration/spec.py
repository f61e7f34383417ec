"""The values of --data, `NAME` or `NAME:WEIGHT` -> which texts, and how much of each.

Reads words; looks at the disk only to tell a name from a weight. Does not know what is in a text.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from kvprof.calibration.text import BUILTIN, SELF, is_hub_dataset, may_be_configured, with_config
from kvprof.errors import UsageError
from kvprof.workspace.text_files import kind_of

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


def configured(ingredients: Sequence[Ingredient], config: str | None) -> tuple[Ingredient, ...]:
    """Return texts with a configuration named behind the one that can have several, as `org/name/config` does.

    Raises UsageError where none of them can, or more than one.
    """
    if config is None:
        return tuple(ingredients)
    able = [ingredient for ingredient in ingredients if may_be_configured(ingredient.name)]
    if len(able) != 1:
        names = ", ".join(ingredient.name for ingredient in able or ingredients)
        why = f"{names} may each have it" if able else f"none of {names} is a dataset that lacks one"
        raise UsageError(
            f"--config {config}: {why}.\n  Write a dataset's configuration behind its name: --data org/name/config"
        )
    return tuple(replace(one, name=with_config(one.name, config)) if one is able[0] else one for one in ingredients)


def exact_weight(number: float) -> Fraction:
    """Return a weight as it is written down, so that turns taken by it are the same on every reading."""
    return Fraction(repr(number))


def _parse(value: str) -> Ingredient:
    name, colon, tail = value.rpartition(":")
    if colon and _NUMBER.fullmatch(tail):
        ingredient = Ingredient(name, _weight(value, float(tail)))
    elif not colon or re.search(r"[\\/]", tail) or kind_of(value) is not None or os.path.exists(value):
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
