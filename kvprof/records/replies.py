"""What commands answer under `--json` where that is no file of its own.

Plain data. Does not know how an answer is printed, nor which command gives it (schemas.py does).
"""

from __future__ import annotations

from typing import Literal

from kvprof.records.audit import PlanCheck
from kvprof.records.document import Count, Number, Positive, Record, Text
from kvprof.records.scores import KlCalibration


class Validated(Record):
    """A file that keeps its contract."""

    file: Text
    kind: Text
    """Its `schema`."""
    model: Text | None = None
    """The model that it was found to be for, where one was named."""


class Calibrated(Record):
    """The factor between measured and predicted KL divergence, and the plans that it was fitted to."""

    path: Text
    """Of the scores that hold it now."""
    kl_calibration: KlCalibration
    plans: tuple[PlanCheck, ...]


class Continuation(Record):
    """What one cache made of a prompt, and the bytes of its keys and values when it was done."""

    text: str
    tokens: tuple[int, ...]
    cache_bytes: Count


class Continuations(Record):
    """One prompt continued twice: in full precision, and as a plan says."""

    prompt_tokens: Positive
    dtype: Text
    full: Continuation
    planned: Continuation

    @property
    def shared_tokens(self) -> int:
        """New tokens before the two part."""
        pairs = zip(self.full.tokens, self.planned.tokens, strict=False)
        return next(
            (count for count, (a, b) in enumerate(pairs) if a != b),
            min(len(self.full.tokens), len(self.planned.tokens)),
        )

    @property
    def is_vacuous(self) -> bool:
        """Whether every token was within the plan's window, so that nothing was ever rounded."""
        return self.planned.cache_bytes == self.full.cache_bytes


class StoredFormat(Record):
    """A format by the runtime's own word, and the bits that an element then stores; D is the head dimension."""

    name: Text
    stored_bits: Text


class Runtime(Record):
    """A runtime that plans can be made for."""

    name: Text
    grammar: Text
    """What it can be told, in words."""
    formats: tuple[StoredFormat, ...]
    writes: Text
    needs: Text
    checked: Text
    checked_version: Text | None = None
    """The newest release that this was held against."""
    checked_on: Text | None = None
    """When, ISO 8601."""


class Runtimes(Record):
    """Every runtime that a plan can be made for."""

    targets: tuple[Runtime, ...]


class Exported(Record):
    """A plan in the words of a runtime."""

    target: Text
    path: Text
    text: str
    """Of the file."""
    remarks: tuple[str, ...]


class Written(Record):
    """Files that were written: pictures, pages."""

    paths: tuple[Text, ...]


class RecipeStep(Record):
    """One command of a recipe."""

    command: Text
    """As a user types it."""
    status: Literal["done", "skipped", "to do", "perhaps"]
    """The last two in a dry run; perhaps: only if what it reads is written anew, and otherwise."""
    reason: Text
    seconds: Number | None = None
    """That it took now."""
    outputs: tuple[Text, ...]


class RecipeRun(Record):
    """What was made of a recipe."""

    recipe: Text
    """Its file."""
    model: Text
    folder: Text
    steps: tuple[RecipeStep, ...]


class ShippedRecipe(Record):
    """A recipe that comes with kvprof."""

    name: Text
    description: Text
    path: Text


class ShippedRecipes(Record):
    """All of them."""

    recipes: tuple[ShippedRecipe, ...]


class Check(Record):
    """One thing that a file says, held against what it was made from."""

    name: Text
    status: Literal["holds", "differs", "unknown"]
    """unknown: it cannot be checked; `note` says why."""
    said: Text | None = None
    """By the file."""
    found: Text | None = None
    """Recomputed, or read again."""
    note: Text | None = None


class Verified(Record):
    """A plan held against all that it was made from, as far as that is at hand."""

    file: Text
    scores: Text | None = None
    """The file that it was held against."""
    model: Text | None = None
    """Likewise."""
    checks: tuple[Check, ...]

    @property
    def differing(self) -> tuple[Check, ...]:
        """What is not as the file says."""
        return tuple(check for check in self.checks if check.status == "differs")
