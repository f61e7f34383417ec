"""Measured quality by position of an Evaluation: the further into the text, the more of the cache is quantized.

Reads an Evaluation. Does not know how it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from kvprof.records.evaluation import Evaluation, PlanResult
from kvprof.records.words import counted
from kvprof.report.plots.hover import hover_point
from kvprof.report.plots.layers import light_grid, plain_log
from kvprof.report.plots.legends import LEGEND_BESIDE, LONGEST_NAME, legend_at_side, legend_height
from kvprof.report.plots.style import (
    FULL_WIDTH,
    PAPER,
    Look,
    NothingToDraw,
    Page,
    cut_text,
    in_paper_style,
    looks,
    model_name,
    new_figure,
    set_title,
)
from kvprof.report.series import ranked_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity = Literal["kl_nats", "top1_agreement"]
AXES: dict[Quantity, str] = {
    "kl_nats": "measured KL divergence (nats per token)",
    "top1_agreement": "top-1 agreement (share of tokens)",
}
UNITS: dict[Quantity, str] = {"kl_nats": "nats a token", "top1_agreement": "of the tokens"}
LEGEND_WIDTH = 2.6
"""Inches of the longest legend at the side, and of the labels at the other."""
LABEL_WIDTH = 0.45
"""Inches of a position of six digits."""
PANEL_HEIGHT = 3.1


@in_paper_style
def positions_figure(
    evaluation: Evaluation, page: Page = PAPER, quantities: Sequence[Quantity] = ("kl_nats",)
) -> Figure:
    """Draw each plan's mean over each stretch of positions, the least KL first in the legend.

    quantities: a panel each. A stretch without any loss has no place on the logarithmic axis of the KL divergence.
    Raises NothingToDraw, MissingMatplotlib.
    """
    results = ranked_results(evaluation)
    if "top1_agreement" not in quantities:
        results = [result for result in results if any(part.kl_nats > 0 for part in result.by_position)]
    if not results:
        raise NothingToDraw("no plan of this evaluation loses anything: there is no KL by position to draw.")
    width = page.width_or(FULL_WIDTH if len(results) > 1 else 5.0)
    beside = width >= LEGEND_BESIDE and len(results) > 1
    figure = new_figure(width, legend_height(len(results), PANEL_HEIGHT * len(quantities), beside), page)
    text = evaluation.text
    read = f"{counted(text.sequences, 'sequence')} of {cut_text(text.dataset, 30)}"
    what = "KL" if len(quantities) == 1 else "quality"
    set_title(figure, f"{model_name(evaluation.model)}: {what} by position, {read}", page)
    edges = _edges(evaluation)
    for number, quantity in enumerate(quantities, start=1):
        axes = figure.add_subplot(len(quantities), 1, number)
        if quantity == "kl_nats":
            axes.set_yscale("log")
        for result, look in looks(results):
            _draw_result(axes, result, quantity, edges, look)
        _number_positions(axes, edges, width - (LEGEND_WIDTH if beside else 0.8))
        axes.set_ylabel(AXES[quantity])
        light_grid(axes, "both")
        if quantity == "kl_nats":
            plain_log(axes.yaxis)
    axes.set_xlabel("position in the text (tokens)")
    legend_at_side(figure, *axes.get_legend_handles_labels(), beside)
    return figure


def _draw_result(axes: Axes, result: PlanResult, quantity: Quantity, edges: Sequence[int], look: Look) -> None:
    """Draw a mark in the middle of each stretch."""
    parts = [part for part in result.by_position if quantity != "kl_nats" or part.kl_nats > 0]
    middles = [(edges.index(part.first) + edges.index(part.last + 1)) / 2 for part in parts]
    values = [getattr(part, quantity) for part in parts]
    axes.plot(
        middles,
        values,
        color=look.colour,
        marker=look.mark,
        markersize=look.size,
        markeredgecolor=look.edge,
        markeredgewidth=0.5,
        linewidth=1.8 if look.is_star else 0.9,
        label=f"{cut_text(result.name, LONGEST_NAME)}, {result.stored_bits:.2f} bits",
        zorder=5 if look.is_star else 3,
    )
    for part, x, value in zip(parts, middles, values, strict=True):
        where = f"{result.name}, positions {part.first} to {part.last}"
        hover_point(axes, x, value, f"{where}: {value:.3g} {UNITS[quantity]}")


def _edges(evaluation: Evaluation) -> list[int]:
    """Return where stretches begin and end; each has the same room, since each is as long as all before it."""
    parts = [part for result in evaluation.plans for part in result.by_position]
    return sorted({end for part in parts for end in (part.first, part.last + 1)})


def _number_positions(axes: Axes, edges: Sequence[int], width_inches: float) -> None:
    """Write the ends of stretches along the axis, as many as fit beside each other."""
    fitting = max(2, int(width_inches / LABEL_WIDTH))
    every = -(-len(edges) // fitting)
    places = range(0, len(edges), every)
    axes.set_xticks(places, [f"{edges[place]:,}" for place in places])
    axes.set_xlim(-0.2, len(edges) - 0.8)
