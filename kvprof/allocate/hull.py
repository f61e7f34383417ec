"""The convex hull of what one tensor could lose at each cost, and the price of a bit that all hulls together make.

Reads costs (exact) and losses (floats), returns corners and slopes. Does not know formats or units.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

Point = tuple[Fraction | int, float]
"""(cost, loss)."""


def corners(points: Sequence[Point]) -> list[int]:
    """Return the places of the points that some price makes the best: cost ascending, loss strictly descending.

    A point on the straight line between two corners is one of them; of equal points, the first.
    """
    hull: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (points[place], place)):
        if hull and points[place][1] >= points[hull[-1]][1]:
            continue
        while len(hull) > 1 and slope(points[hull[-2]], points[hull[-1]]) < slope(points[hull[-1]], points[place]):
            hull.pop()
        hull.append(place)
    return hull


def slope(before: Point, after: Point) -> float:
    """Return the loss saved a unit of cost from one point to a dearer one."""
    return (before[1] - after[1]) / float(after[0] - before[0])


def shadow_price(items: Sequence[Sequence[Point]], spent: Fraction) -> float | None:
    """Return the loss that one more unit of cost would save, at a total cost: the dual of the linear relaxation.

    Every item takes one of its points, or a mixture of two. At a cost where the slope changes, the smaller slope: what
    more would save, not what less would lose. 0 where no item could save any more; None below the cheapest total.
    """
    steps: list[tuple[float, Fraction | int]] = []
    left = spent
    for points in items:
        hull = [points[place] for place in corners(points)]
        left -= hull[0][0]
        steps += [(slope(before, after), after[0] - before[0]) for before, after in pairwise(hull)]
    if left < 0:
        return None
    for saved, cost in sorted(steps, key=lambda step: -step[0]):
        left -= cost
        if left < 0:
            return saved
    return 0.0
