"""Small texts beside points of a picture, written where they are free.

Measures with the figure's own renderer, once its layout is settled. Does not know what the points are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvprof.report.placement import Box, box_between, free_spot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

NOTE_SIZE = 6.5
"""Points."""


def write_beside(
    axes: Axes,
    at: tuple[float, float],
    text: str,
    colour: str,
    steps: Sequence[tuple[float, float]],
    taken: list[Box],
) -> None:
    """Write a small text beside a point of the data where it is free, and take the place; else leave it out.

    steps: where to try, as `free_spot` has them, but in points. taken: boxes in pixels.
    """
    scale = axes.figure.dpi / 72
    x, y = axes.transData.transform(at)
    note = axes.annotate(
        text, at, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=NOTE_SIZE, color=colour
    )
    extent = note.get_window_extent()
    moves = [(scale * dx, scale * dy) for dx, dy in steps]
    half = (extent.width / 2 + scale, extent.height / 2 + scale / 2)
    spot = free_spot(x, y, *half, moves, taken, pixel_box(axes.get_window_extent()))
    if spot is None:
        note.remove()
        return
    taken.append(spot)
    note.xyann = ((spot.x - x) / scale, (spot.y - y) / scale)


def legend_boxes(axes: Axes) -> list[Box]:
    """Return what a legend within a panel takes."""
    legend = axes.get_legend()
    return [] if legend is None else [pixel_box(legend.get_window_extent())]


def marker_boxes(axes: Axes, points: Sequence[tuple[float, float]], half_size: float = 3.0) -> list[Box]:
    """Return what markers at points of the data take, half_size in points."""
    half = half_size * axes.figure.dpi / 72
    return [Box(x, y, half, half) for x, y in (axes.transData.transform(point) for point in points)]


def pixel_box(box: Bbox) -> Box:
    """Return a box of matplotlib's."""
    return box_between(box.x0, box.y0, box.x1, box.y1)
