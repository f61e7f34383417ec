"""History: which commands a recipe ran in a folder, from what, and what they wrote. Read, written, validated.

Made and read by `kvprof run`, one file a folder, so that recipes with steps in common share them. Does not know what is
in the files that it speaks of.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvprof.records.document import Count, Document, Integer, Record, Text

Digests = dict[Text, Text]
"""sha256 by file."""


class StepTaken(Record):
    """One command: all that it depended on when it began, and the files that it left."""

    arguments: tuple[Text, ...]
    """Its command line, places within the folder relative to it."""
    kvprof_version: Text
    model: Text | None
    """A digest of the model's files, or of a model on the hub its commit; null where the command reads no model."""
    reads: Digests
    writes: Digests | None
    """Null where it did not come to its end."""


class Stamp(Record):
    """A large file's digest, which holds as long as size and time of change do."""

    bytes: Count
    changed_ns: Integer
    digest: Text


class History(Document):
    """What was done in a folder."""

    kind: ClassVar[str] = "kvprof.history/1"

    schema_: Literal["kvprof.history/1"] = Field("kvprof.history/1", alias="schema")
    steps: dict[Text, StepTaken] = Field(default_factory=dict)
    model_files: dict[Text, Stamp] = Field(default_factory=dict)
