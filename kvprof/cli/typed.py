"""The command line as the user typed it, for the provenance of a file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any


def typed_command(name: str, options: Mapping[str, Any]) -> str:
    """Return the line that would give the same command again, quoted as a shell needs it.

    Bytes of it that are not UTF-8, as a file's name may have, are replaced: no JSON file could keep them.
    options: all that the command takes, by name, which serve where it was called by other code than a command line.
    """
    if sys.argv[1:2] == [name]:
        return shlex.join(["kvprof", *sys.argv[1:]]).encode(errors="replace").decode()
    from kvprof.recipes.words import as_words

    given = {option: value for option, value in options.items() if (option, value) != ("rule", "exact")}
    return shlex.join(["kvprof", name, *map(str, as_words(given))])
