"""Tables as a notebook shows them: a column a layer, in HTML that needs nothing else.

Reads words and numbers; returns text, every word escaped. Colours are transparent greys and blues over the page's own,
so that they can be read on a light page and on a dark one. Does not know records, which bring their rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

Cell = tuple[str, str, float | None]
"""Text, what is shown on hovering, and the opacity of the blue behind; None for the grey of what was left alone."""

_CELL = "padding:2px 6px;text-align:right;border:1px solid rgba(128,128,128,.35);color:inherit"
_HEAD = _CELL + ";font-weight:normal;opacity:.7"


def table(layers: Iterable[int], rows: Iterable[tuple[str, Sequence[Cell]]], caption: str | None = None) -> str:
    """Return a table. rows: each a name, and a cell for every layer."""
    first = "".join(f'<th scope="col" style="{_HEAD}">{escape(head)}</th>' for head in ("layer", *map(str, layers)))
    body = "".join(
        f'<tr><th scope="row" style="{_HEAD}">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>'
        for name, cells in rows
    )
    named = "" if caption is None else f'<caption style="text-align:left;color:inherit">{escape(caption)}</caption>'
    return (
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse;color:inherit">{named}'
        f"<thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def page(title: str, tables: Iterable[str], lines: Iterable[str]) -> str:
    """Return tables below a title, and lines of text below them."""
    said = "".join(f"<div>{escape(line)}</div>" for line in lines)
    return f'<div style="color:inherit;background:transparent"><b>{escape(title)}</b>{"".join(tables)}{said}</div>'


def _cell(cell: Cell) -> str:
    text, title, opacity = cell
    colour = "128,128,128,0.12" if opacity is None else f"90,140,220,{opacity:.2f}"
    return f'<td title="{escape(title)}" style="{_CELL};background:rgba({colour})">{escape(text)}</td>'
