"""Where a picture's small texts go, so that none lies on another: boxes in pixels, no drawing.

Plain numbers; does not know what is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle: its centre, half its width and half its height."""

    x: float
    y: float
    half_width: float
    half_height: float

    def overlaps(self, other: Box) -> bool:
        """Whether two boxes share any place."""
        return (
            abs(self.x - other.x) < self.half_width + other.half_width
            and abs(self.y - other.y) < self.half_height + other.half_height
        )

    def within(self, frame: Box) -> bool:
        """Whether a box lies inside another."""
        return (
            abs(self.x - frame.x) <= frame.half_width - self.half_width
            and abs(self.y - frame.y) <= frame.half_height - self.half_height
        )


def box_between(x0: float, y0: float, x1: float, y1: float) -> Box:
    """Return the box with these corners."""
    return Box((x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0) / 2, abs(y1 - y0) / 2)


def free_spot(
    x: float,
    y: float,
    half_width: float,
    half_height: float,
    steps: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    frame: Box,
) -> Box | None:
    """Return the first free place for a text beside a point, or None where all overlap something or leave the frame.

    steps: how far the near edge of the text is from the point, to the right and upwards; a text that goes to neither
    side is centred over it.
    """
    for dx, dy in steps:
        centre = x + dx + (math.copysign(half_width, dx) if dx else 0.0)
        box = Box(centre, y + dy, half_width, half_height)
        if box.within(frame) and not any(box.overlaps(other) for other in taken):
            return box
    return None
