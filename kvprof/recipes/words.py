"""A recipe's keys as words of a command line: options, files, the names of plans.

Asks the disk where a relative path leads, and nothing else. Does not know which command the words are for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvprof.errors import InvalidFile
from kvprof.records.recipe import Plans, Target
from kvprof.records.scores import LOSS_INCREASE
from kvprof.workspace.text_files import HUB, names_a_path

OWN_TEXTS = ("builtin", "self")
Words = tuple[str | Path, ...]
"""A Path is a place, which may be written otherwise when the recipe is run from another folder."""


def as_words(options: Mapping[str, Any]) -> Words:
    """Return options as words: a flag by itself, a value behind its option, several each behind one."""
    words: list[str | Path] = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if name == "bits" and value is not None:
            value = ",".join(map(str, value))
        for one in value if isinstance(value, tuple | list) else (value,):
            if one is True:
                words.append(option)
            elif one is not None and one is not False:
                text = amount(one) if isinstance(one, float) else str(one)
                words += [option, one if isinstance(one, Path) else text]
    return tuple(words)


def amount(number: float) -> str:
    """Return a number as a person writes it: 2.5, and 3 for 3.0."""
    return f"{number:.15g}"


def place_of(name: str, home: Path) -> Path:
    """Return where a path of a recipe is: as seen from here where that is within it. home: the recipe's folder."""
    path = Path(os.path.abspath(home / os.path.expanduser(name)))
    try:
        relative = Path(os.path.relpath(path))
    except ValueError:  # on another drive
        return path
    return path if relative.parts[:1] == ("..",) else relative


def own_place(name: str, home: Path) -> Path:
    """Return where results go that a recipe names a folder for: a stranger's writes nowhere else.

    home: the recipe's folder. Raises InvalidFile for a place outside it and the folder that the command runs in.
    """
    place = Path(os.path.realpath(home / os.path.expanduser(name)))
    if not any(place.is_relative_to(os.path.realpath(folder)) for folder in (home, Path.cwd())):
        raise InvalidFile(
            f"out is {name!r}, which leads out of the recipe's folder.\n"
            f"  Give --out {name} to the command, if results are to go there."
        )
    return place_of(name, home)


def text_file(name: str, home: Path) -> tuple[str | None, str]:
    """Return the file, folder or pattern that a value of `data` names, if any, and the weight behind it, colon and all.

    home: the recipe's folder.
    """
    before, colon, weight = name.rpartition(":")
    try:
        float(weight)
    except ValueError:
        before = ""
    file, weight = (before, colon + weight) if before else (name, "")
    is_there = os.path.exists(home / os.path.expanduser(file))
    if file in OWN_TEXTS or file.startswith(HUB) or not (names_a_path(file) or is_there):
        return None, ""
    return file, weight


def plan_name(asked: Plans | Target, budget: float | None) -> str:
    """Return what a plan's file is called, without .json: plan-2.50 or plan-kvmix, or by the name that it is given."""
    named = asked.name if isinstance(asked, Plans) else None
    words = [named or "plan"]
    if isinstance(asked, Target):
        words.append(asked.runtime)
    elif named is None:
        words += [asked.rule] if asked.rule not in (None, "exact") else []
        words += [asked.metric.removesuffix("_norm")] if asked.metric not in (None, LOSS_INCREASE) else []
        words += ["as-published"] if asked.as_published else []
        words += [f"kl-{amount(asked.max_kl)}"] if asked.max_kl is not None else []
        words += [f"k{asked.bits_key}v{asked.bits_value}"] if asked.bits_key is not None else []
        if asked.rule == "uniform" and asked.formats is not None:
            words.append(re.sub(r"\W+", "-", asked.formats))
    if named is None and asked.memory is not None:
        words.append(asked.memory.replace(" ", ""))
    if budget is not None and (named is None or len(asked.budgets or ()) > 1):
        two = f"{budget:.2f}"
        words.append(two if float(two) == budget else amount(budget))
        words += [asked.unit] if asked.unit is not None else []
    return "-".join(str(word) for word in words)
