"""Which file a recipe's name stands for: a path, or the name of a recipe that comes with kvprof."""

from __future__ import annotations

import os
from pathlib import Path

from kvprof.errors import InvalidFile, UsageError, did_you_mean

_HERE = Path(__file__).parent


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with kvprof, by name: of a wheel, or of the checkout that this runs in."""
    checkout = _HERE.parents[1]
    folders = [_HERE] + [checkout / "recipes"] * (checkout / "pyproject.toml").is_file()
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe that a user names.

    A path has a folder in it, ends in .toml or is there; any other word is a name. Raises UsageError for a name that no
    shipped recipe has, InvalidFile for a folder.
    """
    path = Path(os.path.expanduser(recipe))
    if os.path.isdir(path):
        raise InvalidFile(f"{path} is a folder; name a recipe in it, a file that ends in .toml.")
    shipped = shipped_recipes()
    if path.suffix == ".toml" or os.path.dirname(recipe) or (os.path.isfile(path) and recipe not in shipped):
        return path
    if recipe not in shipped:
        raise UsageError(
            f"no recipe is called {recipe!r}: {did_you_mean(recipe, shipped)}\n"
            "  `kvprof run --list` lists them; a file of your own ends in .toml."
        )
    return shipped[recipe]
