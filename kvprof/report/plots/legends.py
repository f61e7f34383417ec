"""Legends outside of the panels, where they hide nothing: below them in a row, at their side, or below in a column.

Does not know what the marks stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND_BESIDE = 5.0
"""Inches of a picture that has room for a legend at its side."""
LONGEST_NAME = 34
"""Letters of a plan's name that a legend has room for."""
ENTRY_HEIGHT = 0.16
"""Inches."""
HANDLE_WIDTH = 0.5
"""Inches of an entry's mark, and of what parts it from the next."""
LETTER_WIDTH = 0.062
"""Inches."""


def legend_height(entries: int, height: float, beside: bool) -> float:
    """Return the height of a picture, in inches, that has room for its legend too.

    height: that the panels need. beside: whether the legend is at their side, rather than below them.
    """
    needed = ENTRY_HEIGHT * entries
    return max(height, needed + 1.0) if beside else height + needed


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    """Put one legend for all panels below them, in as many columns as fit."""
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=_fitting_columns(labels, figure.get_figwidth()),
        frameon=False,
        columnspacing=1.4,
        **options,
    )


def legend_at_side(figure: Figure, handles: Sequence[Any], labels: Sequence[str], beside: bool) -> None:
    """Put a legend of many entries at the side of the panels, or below them where there is no room.

    An entry whose handle is None is a heading.
    """
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], linestyle="none") if handle is None else handle for handle in handles],
        labels,
        loc="outside right center" if beside else "outside lower left",
        frameon=False,
    )


def _fitting_columns(labels: Sequence[str], width_inches: float) -> int:
    """Return the most columns, filled one after the other, that a legend of this width has."""
    for columns in range(len(labels), 1, -1):
        rows = -(-len(labels) // columns)
        longest = [max(map(len, labels[start : start + rows])) for start in range(0, len(labels), rows)]
        if sum(HANDLE_WIDTH + LETTER_WIDTH * length for length in longest) <= width_inches:
            return columns
    return 1
