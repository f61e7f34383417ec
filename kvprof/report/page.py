"""A report as plain data: sections of prose, tables, pictures and commands, which HTML and Markdown share.

Text in it is plain text, from files too: whoever writes it out escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvprof.report.plots.style import Draw


@dataclass(frozen=True)
class Code:
    """Words to type, or a name in a file, within a sentence."""

    text: str


Words = str | Code | tuple[str | Code, ...]
"""A sentence or more; a tuple is read from left to right."""

Role = Literal["prose", "see", "means", "missing", "note", "flag"]
"""see: what a picture shows. means: what that says of this model. missing: which command makes a section. flag: what
changes what a score means."""

LABELS: dict[Role, str] = {"see": "What you see.", "means": "Here."}
"""What a paragraph of a role begins with."""


@dataclass(frozen=True)
class Paragraph:
    """Sentences."""

    words: Words
    role: Role = "prose"


@dataclass(frozen=True)
class Table:
    """Rows under headings. left: columns that are text, not numbers. is_long: shown on demand, where that is known."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = ()
    is_long: bool = False
    strong: int | None = None
    """The row that this is about."""


@dataclass(frozen=True)
class Figure:
    """Pictures under one caption, and their numbers, which stand for them where there are no pictures."""

    caption: str
    drawings: Sequence[Draw]
    """Called by a page that shows pictures, once for each of its widths."""
    numbers: Sequence[Table]
    is_long: bool = False
    are_small: bool = False
    """Whether pictures as wide as a phone stand side by side where there is room; else each is as wide as the page."""


@dataclass(frozen=True)
class Commands:
    """Lines to type."""

    lines: Sequence[str]


Block = Paragraph | Table | Figure | Commands


@dataclass(frozen=True)
class Section:
    """One question and its answer."""

    name: str
    """Of the place in the page; letters and dashes."""
    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    """What to know first, and its number with the unit."""
    sections: Sequence[Section]
    remarks: Sequence[str]
    """What the reader should know of the files."""


def sentence(text: str) -> str:
    """Return a remark as a sentence of its own: a capital, but for a name such as spectral_norm, and a full stop."""
    capital = text if "_" in text.split(" ", 1)[0] else text[:1].upper() + text[1:]
    return capital if capital.endswith((".", "!", "?")) else capital + "."


def missing(command: str, what: str) -> Paragraph:
    """Return the line that stands for a section whose file does not exist."""
    return Paragraph((f"Not measured yet: {what} ", Code(command), " does that."), "missing")
