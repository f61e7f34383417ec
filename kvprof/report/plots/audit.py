"""Predicted against measured losses, a panel for each width of code; points far off are named.

Reads an Audit. Does not know how the numbers were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvprof.records.audit import Audit, AuditPoint
from kvprof.records.formats import TensorName
from kvprof.records.words import counted
from kvprof.report.plots.hover import hover_point
from kvprof.report.plots.layers import drawable, light_grid, plain_log
from kvprof.report.plots.notes import legend_boxes, marker_boxes, write_beside
from kvprof.report.plots.style import (
    COLOURS,
    GREY,
    PAPER,
    NothingToDraw,
    Page,
    cut_text,
    in_paper_style,
    model_name,
    new_figure,
    set_title,
    settle,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS: dict[TensorName, str] = {"key": "osDph", "value": "^v<>*"}
"""One for each format; shape as well as colour says which tensor it is."""
LABELLED = 8
"""Points of a panel that get their layer's number: those furthest from the diagonal."""
PANELS_A_ROW = 2
PANEL_WIDTH = 2.9
"""Inches, at least."""
STEPS = ((5, 0), (-5, 0), (0, 8), (0, -8), (4, 8), (-4, 8), (4, -8), (-4, -8))


def audit_labels(audit: Audit) -> list[str]:
    """Return the metrics of an audit that are nats a token, each of which a picture can show."""
    return list(dict.fromkeys(spread.label for spread in audit.ratios))


@in_paper_style
def audit_figure(audit: Audit, label: str, page: Page = PAPER, bits: int | None = None) -> Figure:
    """Draw one metric in nats against the measured divergence.

    label: of the metric, as the audit's points have it. bits: the one width of code to draw; None for a panel of each.
    Points at zero have no place on a logarithmic axis.
    Raises NothingToDraw, MissingMatplotlib.
    """
    shown = [point for point in audit.points if point.measured_nats > 0 and point.scores.get(label, 0.0) > 0]
    widths = sorted({point.bits for point in shown if bits in (None, point.bits)})
    if not widths:
        raise NothingToDraw(f"no tensor has both a measured divergence and {label} above zero: nothing to draw.")
    width = page.width_or(0.2 + 3.4 * min(len(widths), PANELS_A_ROW))
    columns = min(len(widths), PANELS_A_ROW, max(1, int(width // PANEL_WIDTH)))
    rows = -(-len(widths) // columns)
    figure = new_figure(width, 0.5 + rows * (width / columns + 0.25), page)
    title = f"{model_name(audit.model, 28 * columns)}\n{cut_text(label, 60)} against measured divergence"
    set_title(figure, title, page)
    panels = []
    for number, code_bits in enumerate(widths, start=1):
        axes = figure.add_subplot(rows, columns, number)
        points = [point for point in shown if point.bits == code_bits]
        _scatter(axes, points, label)
        axes.set_title(_panel_title(audit, code_bits, label))
        panels.append((axes, points))
    settle(figure)
    for axes, points in panels:
        _label_outliers(axes, points, label)
    return figure


def _scatter(axes: Axes, points: Sequence[AuditPoint], label: str) -> None:
    """Draw predicted (x) against measured (y) nats, with the diagonal and a band of a factor of two."""
    numbers = [number for point in points for number in (point.scores[label], point.measured_nats)]
    low, high = drawable(min(numbers)) / 2.5, drawable(max(numbers)) * 2.5
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends = [low, high]
    axes.fill_between(ends, [low / 2, high / 2], [2 * low, 2 * high], color="#E8E8E8", zorder=0, label="factor of two")
    axes.plot(ends, ends, color=GREY, linewidth=0.8, zorder=1, label="equal")
    for tensor in COLOURS:
        formats = dict.fromkeys(point.format for point in points if point.tensor == tensor)
        for number, name in enumerate(formats):
            here = [point for point in points if point.tensor == tensor and point.format == name]
            axes.errorbar(
                [point.scores[label] for point in here],
                [point.measured_nats for point in here],
                yerr=_down_and_up(here),
                fmt=MARKERS[tensor][number % len(MARKERS[tensor])],
                color=COLOURS[tensor],
                markerfacecolor=COLOURS[tensor] if number % 2 == 0 else "white",
                markeredgecolor="white" if number % 2 == 0 else COLOURS[tensor],
                markeredgewidth=0.4 if number % 2 == 0 else 0.9,
                elinewidth=0.5,
                alpha=0.9,
                label=f"{tensor}s, {cut_text(name, 20)}",
                zorder=3,
            )
            for point in here:
                text = f"{point.scores[label]:.3g} predicted, {point.measured_nats:.3g} measured, nats a token"
                at = (point.scores[label], point.measured_nats)
                hover_point(axes, *at, f"layer {point.layer}, {tensor}s {name}: {text}")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_box_aspect(1)
    axes.set_xlabel("predicted loss increase\n(nats per token)")
    axes.set_ylabel("measured KL divergence\n(nats per token)")
    light_grid(axes, "both")
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    above = sum(point.measured_nats > point.scores[label] for point in points)
    axes.legend(loc="lower right" if above > len(points) / 2 else "upper left")


def _label_outliers(axes: Axes, points: Sequence[AuditPoint], label: str) -> None:
    """Write layer numbers at the points furthest from the diagonal that lie beyond the band."""

    def distance(point: AuditPoint) -> float:
        return abs(math.log(point.scores[label]) - math.log(point.measured_nats))

    outside = sorted((point for point in points if distance(point) > math.log(2)), key=distance, reverse=True)
    taken = legend_boxes(axes) + marker_boxes(axes, [(point.scores[label], point.measured_nats) for point in points])
    for point in outside[:LABELLED]:
        at = (point.scores[label], point.measured_nats)
        write_beside(axes, at, f"{point.tensor[0].upper()}{point.layer}", COLOURS[point.tensor], STEPS, taken)


def _panel_title(audit: Audit, bits: int, label: str) -> str:
    """Return `2 bits: rank correlation 0.97, median ratio 0.78`."""
    group = counted(bits, "bit")
    parts = []
    for found in audit.agreements:
        if found.label == label and found.group == group and found.spearman is not None:
            parts.append(f"rank correlation {found.spearman:.3f}")
    for spread in audit.ratios:
        if spread.label == label and spread.group == group:
            parts.append(f"median ratio {spread.median:.2f}")
    return f"{group}:\n{', '.join(parts)}" if parts else group


def _down_and_up(points: Sequence[AuditPoint]) -> list[list[float]] | None:
    """Return the lengths of the error bars; one downwards stops short of zero, which a logarithm does not have."""
    if not any(point.measured_stderr_nats for point in points):
        return None
    errors = [(point.measured_nats, point.measured_stderr_nats or 0.0) for point in points]
    return [[min(error, 0.9 * nats) for nats, error in errors], [error for _, error in errors]]
