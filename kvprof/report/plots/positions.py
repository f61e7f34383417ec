"""Measured KL by position of an Evaluation: the further into the text, the more of the cache is quantized.

Reads an Evaluation. Does not know how it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvprof.records.evaluation import Evaluation, PlanResult
from kvprof.records.words import counted
from kvprof.report.plots.contest import Look, looks
from kvprof.report.plots.layers import light_grid
from kvprof.report.plots.legends import LEGEND_BESIDE, LONGEST_NAME, legend_at_side, legend_height
from kvprof.report.plots.style import (
    FULL_WIDTH,
    PAPER,
    NothingToDraw,
    Page,
    cut_text,
    in_paper_style,
    model_name,
    new_figure,
    set_title,
)
from kvprof.report.series import ranked_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND_WIDTH = 2.6
"""Inches of the longest legend at the side, and of the labels at the other."""
LABEL_WIDTH = 0.45
"""Inches of a position of six digits."""


@in_paper_style
def positions_figure(evaluation: Evaluation, page: Page = PAPER) -> Figure:
    """Draw each plan's mean KL over each stretch of positions, the least first in the legend.

    A stretch without any loss has no place on a logarithmic axis. Raises NothingToDraw, MissingMatplotlib.
    """
    results = [result for result in ranked_results(evaluation) if any(part.kl_nats > 0 for part in result.by_position)]
    if not results:
        raise NothingToDraw("no plan of this evaluation loses anything: there is no KL by position to draw.")
    width = page.width_or(FULL_WIDTH if len(results) > 1 else 5.0)
    beside = width >= LEGEND_BESIDE and len(results) > 1
    figure = new_figure(width, legend_height(len(results), 3.1, beside), page)
    text = evaluation.text
    read = f"{counted(text.sequences, 'sequence')} of {cut_text(text.dataset, 30)}"
    set_title(figure, f"{model_name(evaluation.model)}: KL by position, {read}")
    axes = figure.add_subplot()
    edges = _edges(evaluation)
    axes.set_yscale("log")
    for result, look in looks(results):
        _draw_result(axes, result, edges, look)
    _number_positions(axes, edges, width - (LEGEND_WIDTH if beside else 0.8))
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("measured KL divergence (nats per token)")
    light_grid(axes, "both")
    legend_at_side(figure, *axes.get_legend_handles_labels(), beside)
    return figure


def _draw_result(axes: Axes, result: PlanResult, edges: Sequence[int], look: Look) -> None:
    """Draw a mark in the middle of each stretch."""
    parts = [part for part in result.by_position if part.kl_nats > 0]
    axes.plot(
        [(edges.index(part.first) + edges.index(part.last + 1)) / 2 for part in parts],
        [part.kl_nats for part in parts],
        color=look.colour,
        marker=look.mark,
        markersize=look.size,
        markeredgecolor=look.edge,
        markeredgewidth=0.5,
        linewidth=1.8 if look.is_star else 0.9,
        label=f"{cut_text(result.name, LONGEST_NAME)}, {result.stored_bits:.2f} bits",
        zorder=5 if look.is_star else 3,
    )


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
