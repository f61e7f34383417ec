"""The JSON Schema of every file, and of what every command answers under `--json`.

Generated from the records; does not know how a command makes its answer.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

from pydantic import TypeAdapter

from kvprof.errors import UsageError, did_you_mean
from kvprof.records.comparison import Comparison
from kvprof.records.document import Record
from kvprof.records.estimate import Estimate
from kvprof.records.explanation import Explanation
from kvprof.records.inventory import Inventory
from kvprof.records.kinds import KINDS
from kvprof.records.recipe import Recipe
from kvprof.records.replies import (
    Calibrated,
    Continuations,
    Exported,
    RecipeRun,
    Runtimes,
    ShippedRecipes,
    Validated,
    Verified,
    Written,
)

ANSWERS: dict[str, type[Record]] = {
    "inspect": Inventory,
    "norms": KINDS["scores"],
    "gradients": KINDS["scores"],
    "spectra": KINDS["spectra"],
    "allocate": KINDS["plan"],
    "frontier": KINDS["frontier"],
    "explain": Explanation,
    "diff": Comparison,
    "evaluate": KINDS["evaluation"],
    "divergence": KINDS["scores"],
    "calibrate": Calibrated,
    "audit": KINDS["audit"],
    "benchmark": KINDS["benchmark"],
    "plot": Written,
    "report": Written,
    "generate": Continuations,
    "validate": Validated,
    "verify": Verified,
    "merge": KINDS["scores"],
    "targets": Runtimes,
    "export": Exported,
    "import": KINDS["plan"],
    "run": RecipeRun,
}
"""What each command answers. `show` answers any file of KINDS, and `schema` a schema."""

INSTEAD: dict[str, type[Record]] = {
    **dict.fromkeys(("norms", "gradients", "spectra", "divergence", "evaluate"), Estimate),
    "run": ShippedRecipes,
}
"""What some answer instead: under `--dry-run`, and `run --list`."""

OTHERS: dict[str, type[Record]] = {"recipe": Recipe, "recipes": ShippedRecipes}
"""A recipe, which is TOML, as JSON would have it; and what `run --list` answers."""

ESTIMATE = "estimate"
"""The word for what `--dry-run` answers."""


def schema_words() -> list[str]:
    """Return every word that has a schema: kinds of files, commands, and what a dry run answers."""
    return [*KINDS, *(word for word in ANSWERS if word not in KINDS), "show", "schema", *OTHERS, ESTIMATE]


def schema_for(word: str) -> dict[str, Any]:
    """Return the JSON Schema of a kind of file or of a command's answer; raises UsageError for another word."""
    if word == "show":
        return TypeAdapter(reduce(or_, KINDS.values())).json_schema(by_alias=True)
    if word == "schema":
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object"}
    known: dict[str, type[Record]] = {ESTIMATE: Estimate} | OTHERS | ANSWERS | KINDS
    if word not in known:
        raise UsageError(f"{word!r} has no schema: {did_you_mean(word, schema_words())}")
    # A file is read as well as written; an answer is written alone, with what is computed of it.
    is_file = known[word] in (*KINDS.values(), Recipe)
    answers: Any = known[word] | INSTEAD[word] if word in INSTEAD else known[word]
    return TypeAdapter(answers).json_schema(by_alias=True, mode="validation" if is_file else "serialization")
