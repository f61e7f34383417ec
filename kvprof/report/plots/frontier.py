"""The frontier of plans: the least predicted KL at every number of stored bits, its knees, and what was measured.

Reads a Frontier and Evaluations. Does not know how a plan was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvprof.records.evaluation import PlanResult
from kvprof.records.frontier import Frontier, FrontierPoint
from kvprof.records.plan import BitPlan
from kvprof.report.plots.hover import hover_point
from kvprof.report.plots.layers import light_grid, plain_log
from kvprof.report.plots.legends import LEGEND_BESIDE, LONGEST_NAME, legend_at_side, legend_height
from kvprof.report.plots.notes import legend_boxes, marker_boxes, write_beside
from kvprof.report.plots.style import (
    FULL_WIDTH,
    PAPER,
    NothingToDraw,
    Page,
    cut_text,
    in_paper_style,
    looks,
    model_name,
    new_figure,
    set_title,
    settle,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE = "#0072B2"
DOTTED_UP_TO = 60
"""Points of a curve that are marked each."""
RATIOS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 10, 12, 16)


@in_paper_style
def frontier_figure(
    frontier: Frontier | None, measured: Sequence[PlanResult] = (), page: Page = PAPER, plan: BitPlan | None = None
) -> Figure:
    """Draw the predicted KL of the best plan at each number of stored bits, and the measured KL of evaluated plans.

    measured: plans and baselines of the same model, at the bits that they store; on a screen, of no frontier too.
    plan: whose own prediction is marked. What loses nothing has no place on a logarithmic axis.
    Raises NothingToDraw, MissingMatplotlib.
    """
    points = () if frontier is None else frontier.points
    shown = sorted((point for point in points if point.predicted_kl_nats > 0), key=lambda p: p.stored_bits)
    results = [result for result in measured if result.kl_nats > 0]
    if not shown and not (page.on_screen and results):
        raise NothingToDraw("every plan is predicted to lose nothing: there is no frontier to draw.")
    width = page.width_or(FULL_WIDTH if results else 5.0)
    beside = not results or width >= LEGEND_BESIDE
    figure = new_figure(width, legend_height(len(results) + 4, 3.6, beside), page)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    if shown:
        _draw_curve(axes, shown)
    knees = [point for point in shown if point.knee]
    _draw_knees(axes, knees)
    if plan is not None:
        _draw_prediction(axes, plan)
    _draw_results(axes, results)
    set_title(figure, "Measured plans: KL divergence by bits" if frontier is None else _title(frontier), page)
    axes.set_xlabel("stored bits per element (codes and scales)")
    axes.set_ylabel(f"{'' if results else 'predicted '}KL divergence (nats per token)")
    light_grid(axes, "both")
    plain_log(axes.yaxis)
    if results:
        handles, labels = axes.get_legend_handles_labels()
        rest = len(labels) - len(results)
        labels.insert(rest, "measured:")
        legend_at_side(figure, [*handles[:rest], None, *handles[rest:]], labels, beside)
    else:
        axes.legend(loc="upper right")
    _mark_compression(axes)
    settle(figure)
    _label_knees(axes, knees, [(result.stored_bits, result.kl_nats) for result in results])
    return figure


def _draw_curve(axes: Axes, shown: Sequence[FrontierPoint]) -> None:
    bits = [point.stored_bits for point in shown]
    losses = [point.predicted_kl_nats for point in shown]
    errors = [point.predicted_kl_stderr_nats or 0.0 for point in shown]
    if any(errors):
        axes.fill_between(
            bits,
            [max(loss - error, min(losses) / 10) for loss, error in zip(losses, errors, strict=True)],
            [loss + error for loss, error in zip(losses, errors, strict=True)],
            color=CURVE,
            alpha=0.18,
            linewidth=0,
            label="± standard error",
        )
    marker = "." if len(shown) <= DOTTED_UP_TO else None
    axes.plot(bits, losses, color=CURVE, marker=marker, label="best plan, predicted")
    for point in shown:
        text = f"best plan at {point.stored_bits:.4g} stored bits: {point.predicted_kl_nats:.3g} nats a token predicted"
        knee = ", a knee" if point.knee else ""
        hover_point(axes, point.stored_bits, point.predicted_kl_nats, text + knee)


def _draw_knees(axes: Axes, knees: Sequence[FrontierPoint]) -> None:
    if knees:
        axes.plot(
            [point.stored_bits for point in knees],
            [point.predicted_kl_nats for point in knees],
            linestyle="none",
            marker="D",
            markersize=5,
            color=CURVE,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label="knee",
            zorder=4,
        )


def _draw_prediction(axes: Axes, plan: BitPlan) -> None:
    """Draw what a plan says of itself, where it says both its bits and its loss."""
    bits = None if plan.budget is None else plan.budget.stored_bits
    nats = None if plan.solver is None else plan.solver.predicted_kl_nats
    if bits and nats:
        axes.plot(
            [bits],
            [nats],
            linestyle="none",
            marker="*",
            markersize=10,
            markerfacecolor="white",
            color=CURVE,
            label="this plan, predicted",
            zorder=5,
        )
        hover_point(axes, bits, nats, f"the plan: {bits:.4g} stored bits, {nats:.3g} nats a token predicted")


def _draw_results(axes: Axes, results: Sequence[PlanResult]) -> None:
    """Draw measured plans with their standard errors: an evaluated one a star, each baseline a mark of its own."""
    for result, look in looks(results):
        error = min(result.kl_stderr_nats or 0.0, 0.9 * result.kl_nats)
        axes.errorbar(
            [result.stored_bits],
            [result.kl_nats],
            yerr=[[error], [result.kl_stderr_nats or 0.0]] if error else None,
            fmt=look.mark,
            color=look.colour,
            markersize=look.size,
            markeredgecolor=look.edge,
            markerfacecolor=look.colour if look.is_filled else "white",
            markeredgewidth=0.5 if look.is_star else 1.0,
            elinewidth=0.8,
            label=f"{cut_text(result.name, LONGEST_NAME)}: {result.kl_nats:.2g}",
            zorder=6 if look.is_star else 5,
        )
        text = f"{result.name}: {result.stored_bits:.4g} stored bits, {result.kl_nats:.3g}"
        text += f" ± {result.kl_stderr_nats:.2g}" if result.kl_stderr_nats else ""
        hover_point(axes, result.stored_bits, result.kl_nats, f"{text} nats a token measured")


def _title(frontier: Frontier) -> str:
    factor = frontier.kl_calibration
    basis = "not calibrated" if factor is None else f"calibrated, factor {factor.factor:.2f}"
    window = f"{frontier.window.sink_tokens} sinks, window of {frontier.window.recent_tokens} tokens"
    return f"{model_name(frontier.model)}: best plan at every budget\npredictions {basis}; {window}"


def _mark_compression(axes: Axes) -> None:
    """Add an axis on top: how many times smaller than 16 bits."""
    top = axes.secondary_xaxis("top")
    low, high = axes.get_xlim()
    spread: list[float] = []  # none closer to its neighbour than a twelfth of the axis
    for ratio in (ratio for ratio in RATIOS if low <= 16 / ratio <= high):
        if not spread or abs(16 / ratio - 16 / spread[-1]) > (high - low) / 12:
            spread.append(ratio)
    top.set_xticks([16 / ratio for ratio in spread], [f"{ratio:g}x" for ratio in spread])
    top.minorticks_off()
    top.set_xlabel("times smaller than 16 bits")


def _label_knees(axes: Axes, knees: Sequence[FrontierPoint], others: Iterable[tuple[float, float]]) -> None:
    """Write bits and nats beside each knee, above the curve where there is room."""
    taken = legend_boxes(axes) + marker_boxes(axes, list(others))
    for knee in knees:
        text = f"{knee.stored_bits:.2f} bits: {knee.predicted_kl_nats:.2g}"
        at = (knee.stored_bits, knee.predicted_kl_nats)
        write_beside(axes, at, text, CURVE, ((5, 8), (-5, -8), (5, 18), (-5, -18), (5, -8), (-5, 8)), taken)
