"""How a command line and its help show a field of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BUDGET = "Budget"
TEXT = "Text"
FORMATS = "Formats"
WINDOW = "Cache window"
BASELINES = "Baselines"
MEASUREMENT = "Measurement"
DEVICE = "Model and device"
OUTPUT = "Output"
PANELS = (None, BUDGET, TEXT, FORMATS, WINDOW, BASELINES, MEASUREMENT, DEVICE, OUTPUT)
"""The panels of a command's help, in order. What is in none stands first: at most the five that most users need."""


@dataclass(frozen=True)
class Option:
    """Metadata of a field: `Annotated[int, Option("Sequences to read.", TEXT)]`.

    help: one sentence. panel: one of PANELS. default: what the help shows where the default depends on something else.
    shows_range: print the bounds beside the option. words: the list that a shell completes from, of `cli.completion`; a
    `Literal` completes its own. commas: values may stand between commas. is_path: it names a file. also: another flag
    for it.
    """

    help: str
    panel: str | None = None
    default: str | None = None
    shows_range: bool = False
    words: str | None = None
    commas: bool = False
    is_path: bool = False
    also: str | None = None

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Describe the field in a JSON Schema by its help."""
        schema: dict[str, Any] = handler(core_schema)
        return {**schema, "description": self.help}
