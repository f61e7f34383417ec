"""Pictures as SVG text, to stand in a page: tags, scales, ticks, axes, marks.

Colours are classes, which the page's style fills in for its light and its dark scheme. Knows nothing of records.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvprof.report.console import clean

LETTER = 6.4
"""Pixels that a letter takes, roughly, at 12 pixels."""
LINE = 16
"""Pixels from a line of text to the next."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LEAST_DRAWN, MOST_DRAWN = 1e-100, 1e100
"""Where a logarithmic scale ends at the farthest."""
LEAST_TICKS = 3
"""Below so many decades a logarithmic axis has ticks between the powers of ten, too."""


def escape(text: str) -> str:
    """Return text from anywhere as text of a page: no markup, no control codes."""
    return html.escape(clean(text).replace("\n", " "))


def tag(name: str, *body: str, **attributes: str | float | None) -> str:
    """Return an element. body: markup. Attributes are escaped, `class_` and `stroke_width` lose their underscore."""
    words = [
        f' {key.rstrip("_").replace("_", "-")}="{number(value) if not isinstance(value, str) else escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    return f"<{name}{''.join(words)}>{''.join(body)}</{name}>"


def number(value: float) -> str:
    """Return a coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def write(x: float, y: float, text: str, class_: str = "small", anchor: str | None = None, turn: float = 0) -> str:
    """Return a text at a place, turned by so many degrees."""
    turned = f"rotate({number(turn)} {number(x)} {number(y)})" if turn else None
    return tag("text", escape(text), x=x, y=y, class_=class_, text_anchor=anchor, transform=turned)


def marked(tip: str, *body: str, class_: str = "mark") -> str:
    """Return a mark that says its numbers when it is pointed at."""
    return tag("g", tag("title", escape(tip)), *body, class_=class_)


def picture(width: float, height: float, label: str, *body: str) -> str:
    """Return a whole picture. label: what it shows, for whoever cannot see it."""
    return tag(
        "svg",
        *body,
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
    )


@dataclass(frozen=True)
class Scale:
    """From numbers to pixels. low, high: numbers; start, end: where they lie."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return where a number lies; one off the scale at its edge."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, about: int = 5) -> list[float]:
        """Return round numbers on the scale, about so many."""
        return log_ticks(self.low, self.high, about) if self.is_log else linear_ticks(self.low, self.high, about)


def drawable(number: float) -> float:
    """Return a number above zero that a logarithmic scale can end at; a file may have one that overflows beyond it."""
    return min(max(number, LEAST_DRAWN), MOST_DRAWN)


def fitted(values: Sequence[float], start: float, end: float, is_log: bool) -> Scale:
    """Return a scale that holds the values: from zero where it is linear, between powers and halves of ten else.

    On a logarithmic one, values that are not above zero do not count.
    """
    if not is_log:
        top = max(values, default=0.0) or 1.0
        step = linear_ticks(0, top, 5)[1]
        return Scale(0.0, step * math.ceil(top / step - 1e-9), start, end)
    above = [value for value in values if value > 0] or [1.0]
    low, high = drawable(min(above)) / 1.15, drawable(max(above)) * 1.15
    if high / low < 4:
        low, high = low / 1.6, high * 1.6
    return Scale(low, high, start, end, is_log=True)


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten from low to high."""
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(part * power for part in (1, 2, 5, 10) if part * power >= rough * 0.999)
    return [step * count for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, about: int) -> list[float]:
    """Return powers of ten, a few of them where there are many; with 2 and 5 between them where there are few."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    decades = list(range(first, last + 1))
    if len(decades) >= LEAST_TICKS:
        every = -(-len(decades) // (about + 1))
        return [10.0**power for power in decades if power % every == 0]
    parts = (1, 2, 5) if math.log10(high / low) > 0.6 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)
    ticks = [part * 10.0**power for power in range(first - 1, last + 2) for part in parts]
    return [tick for tick in ticks if low <= tick <= high]


def tick_text(value: float) -> str:
    """Return a number as an axis has it: 0.05, 250, 2·10⁻⁵, 10⁶."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    factor = f"{value / 10.0**power:.3g}"
    ten = "10" + str(power).translate(SUPERSCRIPTS)
    return ten if factor == "1" else f"{factor}·{ten}"


@dataclass(frozen=True)
class Frame:
    """The rectangle of a picture that its axes enclose, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def x(self, low: float, high: float, is_log: bool = False) -> Scale:
        """Return a scale across it."""
        return Scale(low, high, self.left, self.right, is_log)

    def axes(
        self,
        x: Scale,
        y: Scale,
        x_title: str,
        y_title: str,
        x_ticks: Sequence[tuple[float, str]] | None = None,
        y_count: int = 5,
    ) -> str:
        """Return both axes with ticks and titles, and thin lines across. x_ticks: places and what stands there."""
        parts = []
        for value in y.ticks(y_count):
            at = y(value)
            parts.append(tag("line", x1=self.left, x2=self.right, y1=at, y2=at, class_="grid"))
            parts.append(write(self.left - 6, at + 4, tick_text(value), "tick", "end"))
        if x_ticks is None:
            x_ticks = [(value, tick_text(value)) for value in x.ticks()]
        for value, text in x_ticks:
            at = x(value)
            parts.append(tag("line", x1=at, x2=at, y1=self.bottom, y2=self.bottom + 4, class_="axis"))
            parts.append(write(at, self.bottom + 17, text, "tick", "middle"))
        parts.append(tag("line", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom, class_="axis"))
        parts.append(tag("line", x1=self.left, x2=self.left, y1=self.top, y2=self.bottom, class_="axis"))
        parts.append(write((self.left + self.right) / 2, self.bottom + 34, x_title, "title", "middle"))
        parts.append(write(2, self.top - 12, y_title, "title"))
        return "".join(parts)


def layer_ticks(count: int, pixels: float) -> list[tuple[float, str]]:
    """Return the layers that get a tick, so that their numbers keep apart on so many pixels."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if pixels / count * step >= 26)
    return [(layer, str(layer)) for layer in range(0, count, every)]


def line(points: Sequence[tuple[float, float]], class_: str) -> str:
    """Return a line through places."""
    return tag("polyline", points=_places(points), class_=class_)


def band(upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], class_: str) -> str:
    """Return the area between two lines from left to right."""
    corners = [*upper, *reversed(lower)]
    return tag("polygon", points=_places(corners), class_=class_)


def _places(points: Sequence[tuple[float, float]]) -> str:
    """Return places to a tenth of a pixel: lines of many points make most of a page."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def marker(x: float, y: float, shape: str, class_: str, size: float = 4) -> str:
    """Return a mark at a place: a circle, triangle, diamond, square or star."""
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=size, class_=class_)
    corners = {"triangle": 3, "diamond": 4, "square": 4, "star": 10}[shape]
    turn = math.pi / 4 if shape == "square" else 0.0
    points = []
    for corner in range(corners):
        angle = 2 * math.pi * corner / corners - math.pi / 2 + turn
        reach = size * (0.5 if shape == "star" and corner % 2 else 1.3)
        points.append(f"{number(x + reach * math.cos(angle))},{number(y + reach * math.sin(angle))}")
    return tag("polygon", points=" ".join(points), class_=class_)


def legend(x: float, y: float, entries: Sequence[tuple[str, str]], width: float) -> tuple[str, float]:
    """Return entries of (markup of a sign 18 pixels wide about its own origin, text), and how far down they reach.

    They stand beside each other from (x, y) on, in more lines where they do not fit the width.
    """
    parts, at, down = [], x, y
    for sign, text in entries:
        needed = 24 + LETTER * len(text) + 14
        if at > x and at + needed - 14 > width:
            at, down = x, down + LINE
        parts.append(tag("g", sign, transform=f"translate({number(at + 9)} {number(down - 4)})"))
        parts.append(write(at + 24, down, text, "small"))
        at += needed
    return "".join(parts), down
