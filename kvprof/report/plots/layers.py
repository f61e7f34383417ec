"""What pictures by layer have in common: an axis of layers, skipped ones hatched; keys and values told apart.

Knows layers by number only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kvprof.records.formats import TensorName
from kvprof.records.words import runs_of
from kvprof.report.plots.style import COLOURS, GREY, MARKS
from kvprof.report.series import LayerNumber

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SKIPPED = "no plan gives bits"
BLANK: dict[str, Any] = {"facecolor": "#F7F7F7", "edgecolor": "#C8C8C8", "hatch": "////", "linewidth": 0}
"""What those layers are hatched with."""
LOG_FROM = 30.0
"""An axis is logarithmic where its largest number is more than so many times its smallest."""


def layer_axis(axes: Axes, first: int, count: int, skipped: Iterable[int], behind: bool = True) -> None:
    """Give a panel an axis of `count` layers from `first` on, and hatch those that no plan gives bits to.

    behind: whether what is drawn hides the hatching; else it lies on top.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(first - 0.7, first + count - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlabel("layer")
    for low, high in runs_of(layer for layer in skipped if first <= layer < first + count):
        colour = BLANK["facecolor"] if behind else "none"
        axes.axvspan(low - 0.5, high + 0.5, **(BLANK | {"facecolor": colour}), zorder=0 if behind else 6)


def draw_numbers(axes: Axes, tensor: TensorName, numbers: Sequence[LayerNumber]) -> None:
    """Draw one number a layer, with its standard error where all have one."""
    errors = [number.stderr for number in numbers if number.stderr is not None]
    axes.errorbar(
        [number.layer for number in numbers],
        [number.value for number in numbers],
        yerr=errors if errors and len(errors) == len(numbers) else None,
        color=COLOURS[tensor],
        marker=MARKS[tensor],
        markeredgecolor="white",
        markeredgewidth=0.4,
        linewidth=1.0,
        elinewidth=0.8,
        capsize=1.5,
        label=f"{tensor}s",
        zorder=3,
    )


def fit_scale(axes: Axes, numbers: Iterable[float]) -> None:
    """Make the vertical axis logarithmic where the numbers need it and allow it; else begin it at zero."""
    found = list(numbers)
    if min(found) > 0 and max(found) > LOG_FROM * min(found):
        axes.set_yscale("log")  # an error that reaches below zero ends at the frame
        axes.set_ylim(min(found) / 1.6, max(found) * 1.6)
    elif max(found) > 0:
        axes.set_ylim(0, 1.08 * max(found))


def tensor_handles(skipped: bool = False) -> tuple[list[Any], list[str]]:
    """Return the legend's keys and values, and what hatching means where there is any."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color=COLOURS[tensor], marker=MARKS[tensor], linewidth=1.0, markeredgecolor="white")
        for tensor in COLOURS
    ]
    labels = [f"{tensor}s" for tensor in COLOURS]
    if skipped:
        handles.append(Patch(**BLANK))
        labels.append(SKIPPED)
    return handles, labels


def light_grid(axes: Axes, axis: Literal["both", "x", "y"] = "y") -> None:
    """Draw the lines that help to read a number off."""
    axes.grid(visible=True, which="major", axis=axis)
    axes.tick_params(color=GREY)
