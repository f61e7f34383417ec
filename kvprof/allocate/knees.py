"""Where a curve of KL divergence over bits bends: the budgets worth a second look.

Reads numbers, returns places. Does not know plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

KNEES = 3
"""How many knees are found at most."""
BEND = math.log(1.1)
"""How far, in the logarithm of the KL divergence, a knee lies below the chord at the least."""


def knees(curve: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places at which a curve of (bits, KL divergence) bends, at most KNEES of them, ascending.

    A knee is the point that lies the farthest below the straight line between the ends, the KL divergence on a
    logarithmic scale: before it a bit divides the KL by more than on the average, after it by less. The same is asked
    again of the parts on both sides of a knee, the greatest bend first. What lies less than BEND below its line is
    none. Of points of equal bits the first counts; points without any loss have no place on such a scale.
    """
    places: list[int] = []
    for place, (bits, kl) in enumerate(curve):
        if kl > 0 and (not places or bits > curve[places[-1]][0]):
            places.append(place)
    logs = {place: (curve[place][0], math.log(curve[place][1])) for place in places}

    def farthest(first: int, last: int) -> tuple[float, int]:
        """Return how far the farthest point between two lies below their line, and which one it is."""
        (left, top), (right, bottom) = logs[places[first]], logs[places[last]]
        slope = (bottom - top) / (right - left)
        return max(
            ((top + slope * (logs[places[at]][0] - left) - logs[places[at]][1], -at) for at in range(first + 1, last)),
            default=(0.0, 0),
        )

    found: list[int] = []
    ends = [0, len(places) - 1]
    while len(found) < KNEES and len(places) > 2:
        parts = [farthest(first, last) for first, last in pairwise(ends) if last - first > 1]
        depth, at = max(parts, default=(0.0, 0))
        if depth < BEND:
            break
        found.append(places[-at])
        ends = sorted([*ends, -at])
    return sorted(found)
