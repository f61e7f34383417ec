"""A page as Markdown: the same sections and numbers, a table where the page has a picture.

All text is escaped, so that no viewer takes any of it for markup or HTML.
"""

from __future__ import annotations

import re

from kvprof.report.console import clean
from kvprof.report.page import LABELS, Block, Code, Commands, Figure, Page, Paragraph, Table, Words

MARKUP = re.compile(r"([\\`*_\[\]{}#|~!])")
ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
LINKS = re.compile(r"\b(https?|ftp|mailto|www)(?=[:.])", re.IGNORECASE)
"""What some viewers make a link of, though nobody asked."""
BULLETS = re.compile(r"^([-+=]|\d+(?=[.)]\s))")
"""What would begin a list, or underline a heading."""
PLAIN_CODE = re.compile(r"[^`<>&|\n]+")
"""What can stand in backticks anywhere, tables and careless viewers included."""


def to_markdown(page: Page) -> str:
    """Return the file's text."""
    parts = [f"# {escape(page.title)}", escape(page.subtitle)]
    if page.facts:
        parts.append(_table(Table("", ("", ""), page.facts, left=(0, 1))))
    parts += [f"**Note.** {escape(remark)}" for remark in page.remarks]
    for section in page.sections:
        parts.append(f"## {escape(section.heading)}")
        parts += [text for block in section.blocks if (text := _block(block))]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Return text from anywhere as text of a Markdown file, in one line."""
    one_line = " ".join(clean(text).split())
    escaped = MARKUP.sub(r"\\\1", one_line).translate(ENTITIES)
    return LINKS.sub(r"\1\\", escaped)


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        label = f"**{LABELS[block.role]}** " if block.role in LABELS else ""
        return label + _words(block.words)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return "\n\n".join([f"*{escape(block.caption)}*", *map(_table, block.numbers)])
    return _commands(block)


def _words(words: Words) -> str:
    parts = words if isinstance(words, tuple) else (words,)
    found = []
    for part in parts:
        if isinstance(part, Code):
            found.append(_code(part.text))
        else:
            lead, tail = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
            found.append(f"{lead}{escape(part)}{tail}")
    return BULLETS.sub(r"\\\1", "".join(found).strip())


def _code(text: str) -> str:
    text = clean(text)
    return f"`{text}`" if PLAIN_CODE.fullmatch(text) else escape(text)


def _table(table: Table) -> str:
    rules = ["---" if place in table.left else "---:" for place in range(len(table.headings))]
    rows = [
        [escape(heading) for heading in table.headings],
        rules,
        *([escape(cell) for cell in row] for row in table.rows),
    ]
    if table.strong is not None:
        rows[2 + table.strong] = [f"**{cell}**" if cell else "" for cell in rows[2 + table.strong]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"{escape(table.caption)}:", "", *lines] if table.caption else lines)


def _commands(commands: Commands) -> str:
    """Return commands in a fence, where none of them could be taken for HTML; else a line each."""
    lines = [clean(line).replace("\n", " ") for line in commands.lines]
    if all(PLAIN_CODE.fullmatch(line) for line in lines):
        return "\n".join(["```sh", *lines, "```"])
    return "\n\n".join(map(escape, lines))
