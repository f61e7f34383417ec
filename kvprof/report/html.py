"""A page as one HTML file that needs nothing else: no network, no fonts, no images.

All text is escaped; beyond that, the page's own policy lets no script run but the one whose hash it names, and nothing
be loaded. Without scripts the page says the same; they show a mark's numbers at once, and sort tables.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files as package_files

from kvprof.report.page import Block, Code, Commands, Drawing, Figure, Page, Paragraph, Role, Section, Table, Words
from kvprof.report.palette import style_lines
from kvprof.report.svg import escape, tag

LABELS: dict[Role, str] = {"see": "What you see.", "means": "Here."}
"""What a paragraph of a role begins with."""


def to_html(page: Page) -> str:
    """Return the file's text."""
    script, style = _asset("report.js"), style_lines() + "\n" + _asset("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    head = "".join(
        (
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="referrer" content="no-referrer">',
            '<link rel="icon" href="data:,">',
            tag("title", escape(page.title)),
            f"<style>\n{style}</style>",
        )
    )
    places = "".join(tag("li", tag("a", escape(each.heading), href=f"#{each.name}")) for each in page.sections)
    facts = "".join(tag("div", tag("dt", escape(name)), tag("dd", escape(value))) for name, value in page.facts)
    remarks = "".join(
        tag("p", tag("span", "Note. ", class_="label"), escape(each), class_="note") for each in page.remarks
    )
    body = "\n".join(
        (
            tag(
                "header",
                tag("h1", escape(page.title)),
                tag("p", escape(page.subtitle), class_="subtitle"),
                tag("dl", facts, class_="facts") if facts else "",
                remarks,
                tag("nav", tag("ol", places), aria_label="Sections"),
            ),
            tag("main", *(_section(each) for each in page.sections)),
            tag("footer", "Made by kvprof report from the files that the last section names."),
        )
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return package_files("kvprof.report").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _section(section: Section) -> str:
    heading = tag("h2", escape(section.heading), id=f"{section.name}-heading")
    blocks = "\n".join(map(_block, section.blocks))
    return "\n" + tag("section", heading, blocks, id=section.name, aria_labelledby=f"{section.name}-heading")


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return _paragraph(block)
    if isinstance(block, Table):
        table = _table(block)
        return tag("details", tag("summary", escape(block.caption)), table) if block.is_long else table
    if isinstance(block, Figure):
        return _figure(block)
    return _commands(block)


def _paragraph(paragraph: Paragraph) -> str:
    words = _words(paragraph.words)
    if paragraph.role in LABELS:
        words = tag("span", LABELS[paragraph.role], class_="label") + " " + words
    return tag("p", words, class_=paragraph.role)


def _words(words: Words) -> str:
    parts = words if isinstance(words, tuple) else (words,)
    return "".join(tag("code", escape(part.text)) if isinstance(part, Code) else escape(part) for part in parts)


def _figure(figure: Figure) -> str:
    panels = tag("div", "".join(map(_drawing, figure.drawings)), class_="panels")
    tables = "".join(map(_table, figure.numbers))
    numbers = tag("details", tag("summary", "The numbers"), tables) if tables else ""
    caption = tag("figcaption", escape(figure.caption))
    if figure.is_long:
        return tag("details", tag("summary", escape(figure.caption)), tag("figure", panels, numbers))
    return tag("figure", panels, caption, numbers)


def _drawing(drawing: Drawing) -> str:
    return tag("div", drawing.svg, class_=drawing.fits)


def _table(table: Table) -> str:
    def cell(name: str, place: int, text: str) -> str:
        scope = "col" if name == "th" else None
        return tag(name, escape(text), class_="left" if place in table.left else None, scope=scope)

    has_heads = any(table.headings)
    head = "".join(cell("th", place, text) for place, text in enumerate(table.headings))
    rows = "".join(
        tag(
            "tr",
            *(cell("td", place, text) for place, text in enumerate(row)),
            class_="about" if number == table.strong else None,
        )
        for number, row in enumerate(table.rows)
    )
    whole = tag(
        "table",
        tag("caption", escape(table.caption)),
        tag("thead", tag("tr", head)) if has_heads else "",
        tag("tbody", rows),
        class_="sortable" if has_heads and len(table.rows) > 1 else None,
    )
    return tag("div", whole, class_="table", tabindex="0", role="region", aria_label=table.caption)


def _commands(commands: Commands) -> str:
    return tag("pre", tag("code", "\n".join(map(escape, commands.lines))), tabindex="0")
