"""Small texts beside points of a picture, written where they are free.

Measures with the figure's own renderer, once its layout is settled. Does not know what the points are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import BboxBase

NOTE_SIZE = 6.5
"""Points."""


def write_beside(
    axes: Axes,
    at: tuple[float, float],
    text: str,
    colour: str,
    steps: Sequence[tuple[float, float]],
    taken: list[BboxBase],
) -> None:
    """Write a small text beside a point of the data where it is free, and take the place; else leave it out.

    steps: where to try, in points: how far the near edge of the text is from the point, to the right and upwards; a
    text that goes to neither side is centred over it. taken: boxes in pixels.
    """
    from matplotlib.transforms import Bbox

    scale = axes.figure.dpi / 72
    x, y = axes.transData.transform(at)
    note = axes.annotate(
        text, at, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=NOTE_SIZE, color=colour
    )
    extent, frame = note.get_window_extent(), axes.get_window_extent()
    half_width, half_height = extent.width / 2 + scale, extent.height / 2 + scale / 2
    for right, up in steps:
        middle = (x + scale * right + (math.copysign(half_width, right) if right else 0.0), y + scale * up)
        box = Bbox.from_extents(
            middle[0] - half_width, middle[1] - half_height, middle[0] + half_width, middle[1] + half_height
        )
        is_inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if is_inside and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            note.xyann = ((middle[0] - x) / scale, (middle[1] - y) / scale)
            return
    note.remove()


def legend_boxes(axes: Axes) -> list[BboxBase]:
    """Return what a legend within a panel takes."""
    legend = axes.get_legend()
    return [] if legend is None else [legend.get_window_extent()]


def marker_boxes(axes: Axes, points: Sequence[tuple[float, float]], half_size: float = 3.0) -> list[BboxBase]:
    """Return what markers at points of the data take, half_size in points."""
    from matplotlib.transforms import Bbox

    half = half_size * axes.figure.dpi / 72
    places = [axes.transData.transform(point) for point in points]
    return [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in places]
