"""Numbers that a mark of a picture says when it is pointed at, kept beside the figure until it is written as SVG.

A hover is a place in a panel and a text. It is no artist of matplotlib's: a PNG has none, and none costs time to draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINT = 5.0
"""Points from the middle of a mark to the edge of what answers for it."""


class Hover(NamedTuple):
    """What is pointed at: a point of the data, or a rectangle; and what it says."""

    axes: Axes
    low: tuple[float, float]
    high: tuple[float, float] | None
    """The corner across from `low`; None for a point. An infinite coordinate is the panel's edge."""
    text: str


_HOVERS: WeakKeyDictionary[Figure, list[Hover]] = WeakKeyDictionary()


def hover_point(axes: Axes, x: float, y: float, text: str) -> None:
    """Let a mark at a point of the data say a text."""
    _HOVERS.setdefault(axes.figure, []).append(Hover(axes, (x, y), None, text))  # type: ignore[arg-type]


def hover_box(axes: Axes, low: tuple[float, float], high: tuple[float, float], text: str) -> None:
    """Let a rectangle between two corners, in the data's coordinates, say a text."""
    _HOVERS.setdefault(axes.figure, []).append(Hover(axes, low, high, text))  # type: ignore[arg-type]


def hovers_of(figure: Figure) -> list[Hover]:
    """Return what the marks of a figure say, in the order in which they were drawn."""
    return _HOVERS.get(figure, [])


def target_of(hover: Hover, figure: Figure) -> tuple[float, float, float, float] | None:
    """Return what answers for a hover: its left, top, right and bottom, in points from the picture's top left.

    It reaches no further than the panel; None where it lies outside of that.
    """
    corners = [hover.low, hover.low if hover.high is None else hover.high]
    limits = (sorted(hover.axes.get_xlim()), sorted(hover.axes.get_ylim()))
    spans = [sorted(ends) for ends in zip(*corners, strict=True)]
    if any(most < low or least > high for (least, most), (low, high) in zip(spans, limits, strict=True)):
        return None
    across, upwards = (
        [min(max(end, low), high) for end in span] for span, (low, high) in zip(spans, limits, strict=True)
    )
    pixels = [hover.axes.transData.transform(corner) for corner in zip(across, upwards, strict=True)]
    to_points = 72 / figure.dpi
    left, right = sorted(float(x) * to_points for x, _ in pixels)
    top, bottom = sorted(72 * figure.get_figheight() - float(y) * to_points for _, y in pixels)
    if hover.high is None:
        return left - POINT, top - POINT, right + POINT, bottom + POINT
    return left, top, right, bottom
