"""Measured KL by position of an Evaluation: the further into the text, the more of the cache is quantized.

Reads an Evaluation. Does not know how it was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvprof.records.evaluation import Evaluation, PlanResult
from kvprof.report.plots.layers import light_grid
from kvprof.report.plots.legends import LEGEND_BESIDE, LONGEST_NAME, legend_at_side, legend_height
from kvprof.report.plots.style import (
    ACCENT,
    FULL_WIDTH,
    OTHER_MARKS,
    OTHERS,
    PAPER,
    NothingToDraw,
    Page,
    cut_text,
    in_paper_style,
    model_name,
    new_figure,
)
from kvprof.report.series import ranked_results, spread_over

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TICKS = 9


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
    figure.suptitle(
        f"{model_name(evaluation.model)}: KL by position, {text.sequences} sequence{'s' * (text.sequences != 1)} "
        f"of {cut_text(text.dataset, 30)}"
    )
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    rivals = 0
    for result in results:
        star = result.role == "plan"
        mark, colour = ("*", ACCENT) if star else (OTHER_MARKS[rivals % len(OTHER_MARKS)], OTHERS[rivals % len(OTHERS)])
        rivals += not star
        _draw_result(axes, result, mark, colour)
    _number_positions(axes, evaluation)
    axes.set_xlabel("position in the text (tokens); a mark is the mean between two lines")
    axes.set_ylabel("measured KL divergence (nats per token)")
    light_grid(axes, "both")
    legend_at_side(figure, *axes.get_legend_handles_labels(), beside)
    return figure


def _draw_result(axes: Axes, result: PlanResult, mark: str, colour: str) -> None:
    """Draw a mark in the middle of each stretch."""
    parts = [part for part in result.by_position if part.kl_nats > 0]
    middles = [(max(1, part.first) * (part.last + 1)) ** 0.5 for part in parts]  # of a logarithmic axis
    star = result.role == "plan"
    axes.plot(
        middles,
        [part.kl_nats for part in parts],
        color=colour,
        marker=mark,
        markersize=9 if star else 5,
        markeredgecolor="black" if star else colour,
        markeredgewidth=0.5,
        linewidth=1.8 if star else 0.9,
        label=f"{cut_text(result.name, LONGEST_NAME)}, {result.stored_bits:.2f} bits",
        zorder=5 if star else 3,
    )


def _number_positions(axes: Axes, evaluation: Evaluation) -> None:
    """Write the ends of stretches along the axis, as many as fit beside each other."""
    edges = {max(1, part.first) for part in evaluation.plan.by_position}
    edges.add(evaluation.plan.by_position[-1].last + 1)
    low, high = min(edges), max(edges)
    spread: list[int] = []
    for edge in spread_over(sorted(edges), TICKS):
        if not spread or edge >= spread[-1] * (high / low) ** (1 / TICKS):
            spread.append(edge)
    axes.set_xticks(spread, [f"{edge:,}" for edge in spread])
    axes.minorticks_off()
    axes.set_xlim(low / 1.05, high * 1.05)
