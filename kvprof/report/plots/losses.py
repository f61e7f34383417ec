"""The loss of every layer in every format as a heat map: keys above values, colours by the logarithm.

Reads Scores. Does not know whether a loss was predicted or, of a divergence, measured; the record says it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.scores import Scores
from kvprof.report.plots.layers import BLANK, SKIPPED, layer_axis
from kvprof.report.plots.legends import legend_below
from kvprof.report.plots.style import (
    FULL_WIDTH,
    HEAT,
    PAPER,
    NothingToDraw,
    Page,
    cut_text,
    in_paper_style,
    model_name,
    new_figure,
    set_title,
)
from kvprof.report.series import LossTable, loss_table, skipped_layers
from kvprof.report.svg import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

ROW = 0.15
"""Inches a format."""
LONGEST_NAME = 20
BAR = 0.13
"""Inches that the scale of colours is wide."""


@in_paper_style
def losses_figure(scores: Scores, page: Page = PAPER) -> Figure:
    """Draw the loss of each layer's keys and values in each format; raises NothingToDraw, MissingMatplotlib.

    A loss of zero, which no logarithm has, gets the colour of the least one.
    """
    from matplotlib.colors import LogNorm

    tables = {tensor: loss_table(scores, tensor) for tensor in TENSORS}
    shown: list[TensorName] = [tensor for tensor in TENSORS if tables[tensor].formats]
    losses = [nats for table in tables.values() for row in table.nats for nats in row if nats]
    if not losses:
        raise NothingToDraw("these scores have no loss_increase above zero: there are no losses to draw.")
    low, high = drawable(min(losses)), drawable(max(losses))
    scale = LogNorm(low, high) if low < high else LogNorm(low / 2, high * 2)
    rows = [max(4, len(tables[tensor].formats)) for tensor in shown]
    figure = new_figure(page.width_or(FULL_WIDTH), 1.1 + 0.35 * len(rows) + ROW * sum(rows), page)
    measured = scores.source == "divergence"
    set_title(
        figure,
        f"{model_name(scores.model)}: {'measured divergence' if measured else 'predicted loss'} of each tensor alone",
    )
    skipped = skipped_layers(scores)
    width = figure.get_figwidth()
    grid = figure.add_gridspec(len(rows), 2, width_ratios=(width - BAR, BAR), height_ratios=rows)
    panels = [figure.add_subplot(grid[row, 0]) for row in range(len(rows))]
    for axes, tensor in zip(panels, shown, strict=True):
        mesh = _panel(axes, tables[tensor], scale)
        layer_axis(axes, 0, len(tables[tensor].layers), skipped, behind=False)
        axes.set_xlim(-0.5, len(tables[tensor].layers) - 0.5)
        axes.set_title(f"{tensor}s")
        if axes is not panels[-1]:
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)
    bar = figure.colorbar(mesh, cax=figure.add_subplot(grid[:, 1]), extend="min" if _has_zero(tables) else "neither")
    what = "measured KL divergence" if measured else "predicted loss increase"
    bar.set_label(f"{what} (nats per token)")
    figure.align_ylabels(panels)
    if skipped:
        _explain_hatching(figure)
    return figure


def _panel(axes: Axes, table: LossTable, scale: LogNorm) -> QuadMesh:
    """Draw a row a format, the fewest stored bits on top, and a column a layer; return what colours it."""
    least = float(scale.vmin or 0.0)
    cells = [[math.nan if nats is None else nats or least / 2 for nats in row] for row in table.nats]
    edges = [[place - 0.5 for place in range(count + 1)] for count in (len(table.layers), len(table.formats))]
    mesh = axes.pcolormesh(*edges, cells, norm=scale, cmap=HEAT, edgecolors="white", linewidth=0.3)
    axes.set_ylim(len(table.formats) - 0.5, -0.5)
    names = [
        cut_text(name, LONGEST_NAME) + ("" if bits is None else f" {bits:5.2f}")
        for name, bits in zip(table.formats, table.stored_bits, strict=True)
    ]
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("format, stored bits\nper element")
    return mesh


def _has_zero(tables: dict[TensorName, LossTable]) -> bool:
    return any(nats == 0 for table in tables.values() for row in table.nats for nats in row)


def _explain_hatching(figure: Figure) -> None:
    from matplotlib.patches import Patch

    legend_below(figure, [Patch(**BLANK)], [SKIPPED])
