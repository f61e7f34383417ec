"""What pictures by layer have in common: an axis of layers, skipped ones hatched; keys and values told apart.

Knows layers by number only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kvprof.records.formats import TensorName
from kvprof.records.words import runs_of
from kvprof.report.plots.hover import hover_point
from kvprof.report.plots.style import COLOURS, GREY, MARKS, PALE
from kvprof.report.series import LayerNumber

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis

SKIPPED = "no plan gives bits"
BLANK: dict[str, Any] = {"facecolor": "#F7F7F7", "edgecolor": PALE, "hatch": "////", "linewidth": 0}
"""What those layers are hatched with."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LOG_FROM = 8.0
"""An axis is logarithmic where its largest number is more than so many times its smallest."""


def layer_axis(
    axes: Axes, first: int, count: int, skipped: Iterable[int], behind: bool = True, down: bool = False
) -> None:
    """Give a panel an axis of `count` layers from `first` on, and hatch those that no plan gives bits to.

    behind: whether what is drawn hides the hatching; else it lies on top. down: whether layers go down.
    """
    from matplotlib.ticker import MaxNLocator

    axis, span = (axes.yaxis, axes.axhspan) if down else (axes.xaxis, axes.axvspan)
    axes.set(**{f"{axis.axis_name}lim": (first - 0.7, first + count - 0.3), f"{axis.axis_name}label": "layer"})
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    for low, high in runs_of(layer for layer in skipped if first <= layer < first + count):
        colour = BLANK["facecolor"] if behind else "none"
        span(low - 0.5, high + 0.5, **(BLANK | {"facecolor": colour}), zorder=0 if behind else 6)


def draw_numbers(
    axes: Axes, tensor: TensorName, numbers: Sequence[LayerNumber], what: str, spans: Sequence[str] = ()
) -> None:
    """Draw one number a layer, with its standard error where all have one; no line leads across a layer without one.

    what: the numbers are, for whoever points at one. spans: what to say besides, one for each number.
    """
    values = {number.layer: number.value for number in numbers}
    errors = {number.layer: number.stderr for number in numbers if number.stderr is not None}
    layers = range(min(values, default=0), max(values, default=-1) + 1)
    axes.errorbar(
        layers,
        [values.get(layer, math.nan) for layer in layers],
        yerr=[errors.get(layer, math.nan) for layer in layers] if errors and len(errors) == len(values) else None,
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
    for (layer, value, stderr), span in zip(numbers, spans or [""] * len(numbers), strict=True):
        error = "" if stderr is None else f" ± {stderr:.2g}"
        hover_point(axes, layer, value, f"layer {layer}, {tensor}s: {what} {value:.4g}{error}{span}")


def fit_scale(axes: Axes, numbers: Iterable[float]) -> None:
    """Make the vertical axis logarithmic where the numbers need it and allow it; else begin it at zero."""
    from matplotlib.ticker import MaxNLocator

    found = list(numbers)
    if min(found) > 0 and max(found) > LOG_FROM * min(found):
        axes.set_yscale("log")  # an error that reaches below zero ends at the frame
        axes.set_ylim(drawable(min(found)) / 1.6, drawable(max(found)) * 1.6)
        plain_log(axes.yaxis)
    elif max(found) > 0:
        axes.set_ylim(0, 1.08 * drawable(max(found)))
        # As many ticks however high the panel comes out: their width, which the layout makes room for, stays the same.
        axes.yaxis.set_major_locator(MaxNLocator(5))


def plain_log(axis: XAxis | YAxis) -> None:
    """Write 0.2, 5 and 10⁶ on a logarithmic axis whose limits are set: text alone, and few numbers.

    An axis that reaches where numbers overflow ends before.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    ends = axis.get_view_interval()
    low, high = map(drawable, ends)
    if (low, high) != tuple(ends):
        axis.axes.set(**{f"{axis.axis_name}lim": (low, high) if low < high else (low / 2, 2 * high)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(lambda value, _: _number_text(value))
    axis.set_minor_locator(NullLocator())


def drawable(number: float) -> float:
    """Return a number above zero, no closer to where numbers overflow than a picture can be drawn."""
    return min(max(number, 1e-100), 1e100)


def _number_text(value: float) -> str:
    """Return a number above zero: 0.05, 250, 2·10⁻⁵, 10⁶."""
    if 1e-3 <= value < 1e5:
        return f"{value:.6g}"
    power = math.floor(math.log10(value) + 1e-9)
    factor = f"{value / 10.0**power:.3g}"
    ten = "10" + str(power).translate(SUPERSCRIPTS)
    return ten if factor == "1" else f"{factor}·{ten}"


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
