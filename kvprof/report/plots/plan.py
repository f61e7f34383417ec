"""A plan: the bits of each layer's keys, above those of its values, each bar under the name of its format.

Reads a BitPlan. Does not know why a layer has these bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.plan import BitPlan
from kvprof.report.plots.hover import hover_box
from kvprof.report.plots.layers import BLANK, SKIPPED, layer_axis, light_grid
from kvprof.report.plots.legends import legend_below
from kvprof.report.plots.style import (
    COLOURS,
    FULL_WIDTH,
    PAPER,
    Page,
    cut_text,
    in_paper_style,
    model_name,
    new_figure,
    set_title,
)
from kvprof.report.series import StoredTensor, layer_count, skipped_layers, stored_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYER_WIDTH = 0.15
"""Inches that a layer's bar and the upright name of its format need."""
MARGIN = 0.8
"""Inches beside the bars."""
PANEL_HEIGHT = 1.3
NAME_SIZE = 6.5
TINT = 0.4
"""Opacity of what scales take, of a bar."""


@in_paper_style
def plan_figure(plan: BitPlan, name: str = "plan", page: Page = PAPER) -> Figure:
    """Draw the stored bits of every tensor, its codes dark and its scales light.

    name: of the plan, for the title. Layers that do not fit beside each other go on in further rows of panels.
    Raises MissingMatplotlib.
    """
    from matplotlib.ticker import MaxNLocator

    width = page.width_or(FULL_WIDTH)
    layers = layer_count(plan)
    fitting = max(1, int((width - MARGIN) // LAYER_WIDTH))
    blocks = -(-layers // fitting)
    a_block = -(-layers // blocks)
    figure = new_figure(width, 0.85 + blocks * (2 * PANEL_HEIGHT + 0.3), page)
    set_title(figure, _title(plan, name), page)
    stored = {tensor: stored_tensors(plan, tensor) for tensor in TENSORS}
    skipped = skipped_layers(plan)
    top = max(one.stored_bits / _share_of_bar(one.format) for own in stored.values() for one in own)
    for block in range(blocks):
        first = block * a_block
        for row, tensor in enumerate(TENSORS):
            axes = figure.add_subplot(2 * blocks, 1, 2 * block + row + 1)
            layer_axis(axes, first, a_block, skipped)
            axes.set_ylim(0, top)
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 4, 5, 10]))
            chosen = [one for one in stored[tensor] if first <= one.layer < first + a_block]
            _bars(axes, tensor, chosen, top)
            _say_bits(axes, tensor, plan, chosen)
            for layer, reason in skipped.items():
                if first <= layer < first + a_block:
                    _say(axes, layer, f"layer {layer}: left in full precision, {reason}")
            axes.set_ylabel(f"{tensor}s, stored bits\nper element")
            light_grid(axes)
            if row == 0:
                axes.set_xlabel("")
                axes.tick_params(labelbottom=False)
            _layer_ticks(axes, first, min(a_block, layers - first), layers)
    _legend(figure, bool(skipped))
    return figure


def _bars(axes: Axes, tensor: TensorName, stored: list[StoredTensor], top: float) -> None:
    layers = [one.layer for one in stored]
    codes = [float(one.nominal_bits) for one in stored]
    scales = [one.stored_bits - one.nominal_bits for one in stored]
    axes.bar(layers, codes, width=0.8, color=COLOURS[tensor], zorder=3, label="codes")
    axes.bar(layers, scales, width=0.8, bottom=codes, color=COLOURS[tensor], alpha=TINT, zorder=3, label="scales")
    for one in stored:
        at = (one.layer, one.stored_bits + 0.02 * top)
        axes.text(*at, one.format, rotation=90, ha="center", va="bottom", fontsize=NAME_SIZE)


def _say_bits(axes: Axes, tensor: TensorName, plan: BitPlan, stored: list[StoredTensor]) -> None:
    shares = {entry.layer: entry.tensor(tensor).recent_fraction for entry in plan.layers}
    for one in stored:
        bits = f"{one.nominal_bits} bits a code, {one.stored_bits:.4g} stored"
        recent = f", {shares[one.layer]:.0%} of the past in full precision" if shares[one.layer] else ""
        _say(axes, one.layer, f"layer {one.layer} {tensor}s: {one.format}, {bits}{recent}")


def _say(axes: Axes, layer: int, text: str) -> None:
    hover_box(axes, (layer - 0.45, -math.inf), (layer + 0.45, math.inf), text)


def _share_of_bar(name: str) -> float:
    """Return how much of a panel's height is left to a bar under the name of its format, a letter 0.62 of its size."""
    return max(0.2, 1 - (0.62 * NAME_SIZE * len(name) / 72 + 0.06) / (PANEL_HEIGHT - 0.1))


def _layer_ticks(axes: Axes, first: int, count: int, layers: int) -> None:
    """Write the number of every layer where they fit beside each other, else of every fifth."""
    every = 1 if layers <= 100 else 5
    axes.set_xticks([layer for layer in range(first, first + count) if layer % every == 0])
    axes.tick_params(axis="x", labelsize=NAME_SIZE, length=2)


def _title(plan: BitPlan, name: str) -> str:
    line = f"{model_name(plan.model, 40)}: {cut_text(name, 40)}"
    if plan.budget is not None and plan.budget.stored_bits is not None:
        line += f", {plan.budget.stored_bits:.3f} stored bits per element"
    return line


def _legend(figure: Figure, skipped: bool) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    handles: list[Any] = [
        tuple(Patch(facecolor=colour, alpha=alpha) for colour in COLOURS.values()) for alpha in (1, TINT)
    ]
    labels = ["codes", "scales and zero points"]
    if skipped:
        handles.append(Patch(**BLANK))
        labels.append(SKIPPED)
    legend_below(figure, handles, labels, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)})
