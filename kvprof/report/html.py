"""A page as one HTML file that needs nothing else: no network, no fonts, no images.

The template escapes all text; beyond that, the page's own policy lets no script run but the one whose hash it names,
and nothing be loaded. Without scripts the page says the same; they show a mark's numbers at once, and sort tables.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from importlib.resources import files as package_files
from itertools import count
from typing import Any

from jinja2 import Environment

from kvprof.report.console import clean
from kvprof.report.page import LABELS, Figure, Page
from kvprof.report.plots.embedding import page_svg
from kvprof.report.plots.style import MissingMatplotlib, NothingToDraw
from kvprof.report.plots.style import Page as Canvas

WIDE, NARROW, SMALL = (920, 7.5), (358, 3.4), (440, 3.4)
"""Pixels and inches of a picture on a wide page, on a phone, and of one of two beside each other.

An inch is what letters are measured in: those of 8 points are 12 to 14 pixels high.
"""


def to_html(page: Page) -> str:
    """Return the file's text. Where matplotlib is missing, tables stand for pictures, and a note says so."""
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    figures = {id(block): block for section in page.sections for block in section.blocks if isinstance(block, Figure)}
    remarks = list(page.remarks)
    drawn: dict[int, list[tuple[str, str]]] = {}
    numbers = count(1)
    try:
        for key, figure in figures.items():
            drawn[key] = list(_pictures(figure, numbers.__next__))
    except MissingMatplotlib as error:
        remarks.append(f"Tables stand for the pictures: {clean(str(error))}")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_plain_text)
    template = environment.from_string(_asset("report.html.jinja"))
    return template.render(
        page=page,
        remarks=remarks,
        labels=LABELS,
        kind=lambda block: type(block).__name__,
        pictures=lambda figure: drawn.get(id(figure), []),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        style=_asset("report.css"),
        script=script,
    )


def _pictures(figure: Figure, number: Callable[[], int]) -> Iterator[tuple[str, str]]:
    """Yield each picture as often as a page needs it: the widths that it fits, and its SVG."""
    widths = {"any": SMALL} if figure.are_small else {"wide": WIDE, "narrow": NARROW}
    for draw in figure.drawings:
        for name, (pixels, inches) in widths.items():
            try:
                picture = draw(Canvas(inches, on_screen=True))
            except NothingToDraw:
                continue
            yield name, page_svg(picture, f"p{number()}-", pixels)


def _plain_text(value: Any) -> Any:
    """Return text from anywhere without control codes, in one line; markup as it is."""
    return clean(value).replace("\n", " ") if type(value) is str else value


def _asset(name: str) -> str:
    return package_files("kvprof.report").joinpath("assets").joinpath(name).read_text(encoding="utf-8")
