"""The loss of every layer in every format as a heat map: colours by the logarithm, a plan's choices framed.

Reads Scores, and a BitPlan. Does not know whether a loss was predicted or, of a divergence, measured; the record says.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores
from kvprof.report.plots.hover import hover_box
from kvprof.report.plots.layers import BLANK, SKIPPED, drawable, layer_axis, plain_log
from kvprof.report.plots.legends import legend_below
from kvprof.report.plots.style import (
    FULL_WIDTH,
    HEAT,
    HEAT_STEPS,
    PAPER,
    NothingToDraw,
    Page,
    cut_text,
    in_paper_style,
    model_name,
    new_figure,
    set_title,
)
from kvprof.report.series import LossTable, layer_count, loss_table, skipped_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Colormap, LogNorm
    from matplotlib.figure import Figure

ROW = 0.15
"""Inches a format; on a screen, where layers go down, a layer."""
LONGEST_NAME = 20
BAR = 0.13
"""Inches that the scale of colours is wide."""


@dataclass(frozen=True)
class _Cells:
    """How cells are drawn. down: whether layers go down, rather than across. skipped: layers without a hover."""

    scale: LogNorm
    colours: Colormap
    down: bool
    skipped: Collection[int]

    def corners(self, layer: float, row: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return two opposite corners of a cell."""
        x, y = (row, layer) if self.down else (layer, row)
        return (x - 0.5, y - 0.5), (x + 0.5, y + 0.5)


@in_paper_style
def losses_figure(
    scores: Scores, page: Page = PAPER, tensors: Sequence[TensorName] = TENSORS, plan: BitPlan | None = None
) -> Figure:
    """Draw the loss of each layer's keys and values in each format; raises NothingToDraw, MissingMatplotlib.

    Layers go across; on a screen, down. A loss of zero, which no logarithm has, gets the colour of the least one.
    tensors: a panel each, all on one scale of colours. plan: whose formats get a frame.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    tables = {tensor: loss_table(scores, tensor) for tensor in TENSORS}
    shown = [tensor for tensor in tensors if tables[tensor].formats]
    losses = [nats for table in tables.values() for row in table.nats for nats in row if nats]
    if not losses:
        raise NothingToDraw("these scores have no loss_increase above zero: there are no losses to draw.")
    if not shown:
        raise NothingToDraw(f"these scores have no loss_increase of {' and '.join(tensors)}s: there are none to draw.")
    low, high = (drawable(nats) for nats in (min(losses), max(losses)))
    measured = scores.source == "divergence"
    skipped = skipped_layers(scores)
    width, layers = page.width_or(FULL_WIDTH), layer_count(scores)
    cells = _Cells(
        LogNorm(low, high) if low < high else LogNorm(low / 2, high * 2),
        colormaps[HEAT].resampled(HEAT_STEPS) if page.on_screen else colormaps[HEAT],
        down=page.on_screen,
        skipped=skipped,
    )
    what = "measured divergence" if measured else "predicted loss"
    title = f"{model_name(scores.model)}: {what} of each tensor alone"
    if cells.down:
        height = len(shown) * (1.2 + ROW * layers) + 0.5
        figure = new_figure(width, height, page)
        panels = [figure.add_subplot(len(shown), 1, place + 1) for place in range(len(shown))]
        bar_place: dict[str, Any] = {"ax": panels, "location": "bottom", "fraction": BAR / height, "aspect": 25}
    else:
        rows = [max(4, len(tables[tensor].formats)) for tensor in shown]
        figure = new_figure(width, 1.1 + 0.35 * len(rows) + ROW * sum(rows), page)
        grid = figure.add_gridspec(len(rows), 2, width_ratios=(width - BAR, BAR), height_ratios=rows)
        panels = [figure.add_subplot(grid[row, 0]) for row in range(len(rows))]
        bar_place = {"cax": figure.add_subplot(grid[:, 1])}
    set_title(figure, title, page)
    for axes, tensor in zip(panels, shown, strict=True):
        mesh = _panel(axes, tables[tensor], cells)
        _name_cells(axes, tables[tensor], cells, is_last=axes is panels[-1])
        axes.set_title(f"{tensor}s")
        chosen = {} if plan is None else {entry.layer: entry.tensor(tensor).name for entry in plan.layers}
        _frame_chosen(axes, tables[tensor], cells, chosen)
        _say_losses(axes, tensor, tables[tensor], cells, chosen)
    bar = figure.colorbar(mesh, extend="min" if _has_zero(tables) else "neither", **bar_place)
    bar.set_label(f"{'measured KL divergence' if measured else 'predicted loss increase'} (nats per token)")
    plain_log(bar.ax.xaxis if cells.down else bar.ax.yaxis)
    figure.align_ylabels(panels)
    if skipped:
        legend_below(figure, [Patch(**BLANK)], [SKIPPED])
    return figure


def _panel(axes: Axes, table: LossTable, cells: _Cells) -> QuadMesh:
    """Draw a cell for each layer and format, the fewest stored bits first; return what colours it."""
    least = float(cells.scale.vmin or 0.0)
    nats = [[math.nan if loss is None else loss or least / 2 for loss in row] for row in table.nats]
    edges = [[place - 0.5 for place in range(count + 1)] for count in (len(table.layers), len(table.formats))]
    if cells.down:
        nats, edges = [list(column) for column in zip(*nats, strict=True)], edges[::-1]
    look: dict[str, Any] = {"norm": cells.scale, "cmap": cells.colours, "edgecolors": "white", "linewidth": 0.3}
    return axes.pcolormesh(*edges, nats, **look, clip_on=False)


def _name_cells(axes: Axes, table: LossTable, cells: _Cells, is_last: bool) -> None:
    """Write formats along one axis, layers along the other. is_last: of the panels, which alone numbers layers."""
    names = [
        cut_text(name, LONGEST_NAME) + ("" if bits is None else f" {bits:5.2f}")
        for name, bits in zip(table.formats, table.stored_bits, strict=True)
    ]
    places, ends = range(len(names)), (len(names) - 0.5, -0.5)
    if cells.down:
        layer_axis(axes, 0, len(table.layers), cells.skipped, behind=False, down=True)
        axes.set_yticks(table.layers, [str(layer) for layer in table.layers], fontsize=6.5)
        axes.set_xticks(places, names, fontsize=6.5, rotation=90)
        axes.set(xlim=ends[::-1], ylim=(len(table.layers) - 0.5, -0.5))
        axes.tick_params(axis="x", length=0, labeltop=True, labelbottom=False)
        return
    layer_axis(axes, 0, len(table.layers), cells.skipped, behind=False)
    axes.set(ylim=ends, xlim=(-0.5, len(table.layers) - 0.5))
    axes.set_yticks(places, names, fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("format, stored bits\nper element")
    if not is_last:
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)


def _frame_chosen(axes: Axes, table: LossTable, cells: _Cells, chosen: Mapping[int, str]) -> None:
    """Frame each layer's format in the plan, dark in light, which shows on every colour."""
    from matplotlib.collections import PolyCollection

    frames = []
    for layer, name in chosen.items():
        if name in table.formats and layer in table.layers:
            (left, bottom), (right, top) = cells.corners(layer, table.formats.index(name))
            frames.append([(left, bottom), (left, top), (right, top), (right, bottom)])
    for colour, width in (("white", 2.6), ("black", 1.2)) if frames else ():
        axes.add_collection(PolyCollection(frames, facecolors="none", edgecolors=colour, linewidths=width, zorder=4))


def _say_losses(axes: Axes, tensor: TensorName, table: LossTable, cells: _Cells, chosen: Mapping[int, str]) -> None:
    for row, (name, bits) in enumerate(zip(table.formats, table.stored_bits, strict=True)):
        known = "no format of this cache" if bits is None else f"{bits:.4g} stored bits"
        for layer, nats in zip(table.layers, table.nats[row], strict=True):
            if nats is None or layer in cells.skipped:
                continue
            text = f"layer {layer}, {tensor}s {name} ({known}): {nats:.3g} nats a token"
            hover_box(axes, *cells.corners(layer, row), text + (", in the plan" if chosen.get(layer) == name else ""))


def _has_zero(tables: dict[TensorName, LossTable]) -> bool:
    return any(nats == 0 for table in tables.values() for row in table.nats for nats in row)
