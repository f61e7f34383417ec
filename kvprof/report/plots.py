"""Pictures: predicted against measured losses, and the frontier of plans. The importer of matplotlib.

Reads records, writes PNG files. Does not know how the numbers were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprof.errors import KvprofError
from kvprof.records.audit import Audit, AuditPoint
from kvprof.records.formats import TensorName
from kvprof.records.frontier import Frontier, FrontierPoint
from kvprof.records.runs import replaced_when_whole
from kvprof.report.placement import Box, box_between, free_spot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

DPI = 100
COLOURS: dict[TensorName, str] = {"key": "#0072B2", "value": "#D55E00"}
"""Blue and vermilion of Okabe and Ito: told apart by colour-blind eyes and in grey."""
MARKERS: dict[TensorName, str] = {"key": "osDph", "value": "^v<>*"}
"""One for each format; shape as well as colour says which tensor it is."""
GREY = "#606060"
LETTER = (4.0, 8.0)
"""Half the width and the height, in pixels, that a letter of a small text takes."""
LABELLED = 8
"""Points of a panel that get their layer's number: those furthest from the diagonal."""
PANELS_A_ROW = 3


class MissingMatplotlib(KvprofError):
    """Pictures are drawn by a package that is not installed."""


def draw_audit(audit: Audit, label: str, path: Path) -> Path:
    """Draw one metric in nats against the measured divergence, a panel for each width of code; return the file.

    label: of the metric, as the audit's points have it. Points at zero have no place on a logarithmic axis.
    Raises MissingMatplotlib, OutputError.
    """
    shown = [point for point in audit.points if point.measured_nats > 0 and point.scores.get(label, 0.0) > 0]
    widths = sorted({point.bits for point in shown})
    if not widths:
        raise KvprofError(f"no tensor has both a measured divergence and {label} above zero: nothing to draw.")
    columns = min(len(widths), PANELS_A_ROW)
    rows = -(-len(widths) // columns)
    figure = new_figure(0.8 + 5.0 * columns, 0.9 + 5.15 * rows)
    model = audit.model.id if audit.model and audit.model.id else "a model"
    figure.suptitle(f"{label} against measured divergence\n{cut_text(model, 56 * columns)}", fontsize=12)
    panels = []
    for number, bits in enumerate(widths, start=1):
        axes = figure.add_subplot(rows, columns, number)
        points = [point for point in shown if point.bits == bits]
        _scatter(axes, points, label)
        axes.set_title(_panel_title(audit, bits, label), fontsize=11)
        panels.append((axes, points))
    figure.draw_without_rendering()  # only now is it known where everything lies
    figure.set_layout_engine("none")
    for axes, points in panels:
        _label_outliers(axes, points, label)
    return save_figure(figure, path)


def draw_frontier(frontier: Frontier, path: Path) -> Path:
    """Draw the predicted KL of the best plan at each number of stored bits, its knees marked; return the file.

    A plan that is predicted to lose nothing has no place on a logarithmic axis.
    Raises MissingMatplotlib, OutputError, KvprofError where there is nothing to draw.
    """
    shown = sorted((point for point in frontier.points if point.predicted_kl_nats > 0), key=lambda p: p.stored_bits)
    if not shown:
        raise KvprofError("every plan is predicted to lose nothing: there is nothing to draw.")
    figure = new_figure(7.6, 5.0)
    axes = figure.add_subplot()
    bits = [point.stored_bits for point in shown]
    losses = [point.predicted_kl_nats for point in shown]
    axes.set_yscale("log")
    if any(point.predicted_kl_stderr_nats for point in shown):
        axes.fill_between(
            bits,
            [max(point.predicted_kl_nats - (point.predicted_kl_stderr_nats or 0), losses[-1] / 10) for point in shown],
            [point.predicted_kl_nats + (point.predicted_kl_stderr_nats or 0) for point in shown],
            color=COLOURS["key"],
            alpha=0.18,
            linewidth=0,
            label="± standard error",
        )
    axes.plot(
        bits, losses, color=COLOURS["key"], linewidth=1.6, marker="." if len(shown) <= 60 else None, label="best plan"
    )
    knees = [point for point in shown if point.knee]
    if knees:
        axes.plot(
            [point.stored_bits for point in knees],
            [point.predicted_kl_nats for point in knees],
            linestyle="none",
            marker="D",
            markersize=7,
            color=COLOURS["value"],
            markeredgecolor="white",
            label="knee",
        )
    model = frontier.model.id if frontier.model and frontier.model.id else "a model"
    factor = frontier.kl_calibration
    basis = "not calibrated" if factor is None else f"calibrated, factor {factor.factor:.2f}"
    window = f"sinks {frontier.window.sink_tokens}, window {frontier.window.recent_tokens}"
    figure.suptitle(f"{cut_text(model, 70)}\nbest plan at every budget ({basis}; {window})", fontsize=11)
    axes.set_xlabel("stored bits an element (codes and scales)")
    axes.set_ylabel("predicted KL divergence, nats a token")
    axes.grid(visible=True, which="major", color="#D8D8D8", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", fontsize=9, framealpha=0.95)
    _mark_compression(axes, bits)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _label_knees(axes, knees)
    return save_figure(figure, path)


def _mark_compression(axes: Axes, bits: Sequence[float]) -> None:
    """Add an axis on top: how many times smaller than 16 bits."""
    top = axes.secondary_xaxis("top")
    low, high = axes.get_xlim()
    ratios = [ratio for ratio in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 10, 12, 16) if low <= 16 / ratio <= high]
    spread: list[float] = []  # none closer to its neighbour than a twelfth of the axis
    for ratio in sorted(ratios):
        if not spread or abs(16 / ratio - 16 / spread[-1]) > (high - low) / 12:
            spread.append(ratio)
    top.set_xticks([16 / ratio for ratio in spread], [f"{ratio:g}x" for ratio in spread])
    top.minorticks_off()
    top.set_xlabel("times smaller than 16 bits")


def _label_knees(axes: Axes, knees: Sequence[FrontierPoint]) -> None:
    """Write bits and nats beside each knee, above the curve where there is room."""
    taken, frame = _legend_box(axes), _box(axes.get_window_extent())
    for knee in knees:
        text = f"{knee.stored_bits:.2f} bits: {knee.predicted_kl_nats:.2g}"
        at = (knee.stored_bits, knee.predicted_kl_nats)
        _write_beside(axes, at, text, COLOURS["value"], ((8, 13), (-8, -14), (8, 29), (-8, -30)), taken, frame)


def _scatter(axes: Axes, points: Sequence[AuditPoint], label: str) -> None:
    """Draw predicted (x) against measured (y) nats, with the diagonal and a band of a factor of two."""
    numbers = [number for point in points for number in (point.scores[label], point.measured_nats)]
    low, high = min(numbers) / 2.5, max(numbers) * 2.5
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends = [low, high]
    axes.fill_between(ends, [low / 2, high / 2], [2 * low, 2 * high], color="#E8E8E8", zorder=0, label="factor of two")
    axes.plot(ends, ends, color=GREY, linewidth=1, zorder=1, label="equal")
    for tensor in COLOURS:
        formats = dict.fromkeys(point.format for point in points if point.tensor == tensor)
        for number, name in enumerate(formats):
            here = [point for point in points if point.tensor == tensor and point.format == name]
            axes.errorbar(
                [point.scores[label] for point in here],
                [point.measured_nats for point in here],
                yerr=_down_and_up(here),
                fmt=MARKERS[tensor][number % len(MARKERS[tensor])],
                markersize=6,
                color=COLOURS[tensor],
                markerfacecolor=COLOURS[tensor] if number % 2 == 0 else "white",
                markeredgecolor="white" if number % 2 == 0 else COLOURS[tensor],
                markeredgewidth=0.6 if number % 2 == 0 else 1.2,
                elinewidth=0.7,
                alpha=0.9,
                label=f"{tensor}s, {name}",
                zorder=3,
            )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_box_aspect(1)
    axes.set_xlabel("predicted loss increase, nats a token")
    axes.set_ylabel("measured KL divergence, nats a token")
    axes.grid(visible=True, which="major", color="#D8D8D8", linewidth=0.5)
    axes.set_axisbelow(True)
    above = sum(point.measured_nats > point.scores[label] for point in points)
    axes.legend(loc="lower right" if above > len(points) / 2 else "upper left", fontsize=9, framealpha=0.95)


def _label_outliers(axes: Axes, points: Sequence[AuditPoint], label: str) -> None:
    """Write layer numbers at the points furthest from the diagonal that lie beyond the band."""

    def distance(point: AuditPoint) -> float:
        return abs(math.log(point.scores[label] / point.measured_nats))

    outside = sorted((point for point in points if distance(point) > math.log(2)), key=distance, reverse=True)
    taken, frame = _legend_box(axes), _box(axes.get_window_extent())
    for point in points:  # the markers themselves
        x, y = axes.transData.transform((point.scores[label], point.measured_nats))
        taken.append(Box(x, y, 6.0, 6.0))
    steps = ((8, 0), (-8, 0), (0, 13), (0, -13), (7, 12), (-7, 12), (7, -12), (-7, -12))
    for point in outside[:LABELLED]:
        at = (point.scores[label], point.measured_nats)
        text = f"{point.tensor[0].upper()}{point.layer}"
        _write_beside(axes, at, text, COLOURS[point.tensor], steps, taken, frame)


def _write_beside(
    axes: Axes,
    at: tuple[float, float],
    text: str,
    colour: str,
    steps: Sequence[tuple[float, float]],
    taken: list[Box],
    frame: Box,
) -> None:
    """Write a small text beside a point of the data where it is free, and take the place; else leave it out."""
    x, y = axes.transData.transform(at)
    box = free_spot(x, y, LETTER[0] * len(text), LETTER[1], steps, taken, frame)
    if box is None:
        return
    taken.append(box)
    axes.annotate(
        text,
        at,
        xytext=(72 / DPI * (box.x - x), 72 / DPI * (box.y - y)),  # from pixels to points
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=8.5,
        color=colour,
    )


def _legend_box(axes: Axes) -> list[Box]:
    legend = axes.get_legend()
    return [] if legend is None else [_box(legend.get_window_extent())]


def _box(box: Bbox) -> Box:
    return box_between(box.x0, box.y0, box.x1, box.y1)


def _panel_title(audit: Audit, bits: int, label: str) -> str:
    """Return `2 bits: rank correlation 0.97, predicted over measured 0.78 in the median`."""
    group = f"{bits} bit{'s' if bits > 1 else ''}"
    parts = []
    for found in audit.agreements:
        if found.label == label and found.group == group and found.spearman is not None:
            parts.append(f"rank correlation {found.spearman:.3f}")
    for spread in audit.ratios:
        if spread.label == label and spread.group == group:
            parts.append(f"median ratio {spread.median:.2f}")
    return group + (": " + ", ".join(parts) if parts else "")


def _down_and_up(points: Sequence[AuditPoint]) -> list[list[float]] | None:
    """Return the lengths of the error bars; one downwards stops short of zero, which a logarithm does not have."""
    if not any(point.measured_stderr_nats for point in points):
        return None
    errors = [(point.measured_nats, point.measured_stderr_nats or 0.0) for point in points]
    return [[min(error, 0.9 * nats) for nats, error in errors], [error for _, error in errors]]


def cut_text(text: str, length: int) -> str:
    """Return a text, its end cut off where it is longer than a picture has room for."""
    return text if len(text) <= length else text[: length - 1] + "…"


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches; of its own, so that no global state of matplotlib's is touched.

    Raises MissingMatplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingMatplotlib(
            "drawing a picture needs the package matplotlib.\n  Install it: pip install 'kvprof-bits[plot]'"
        ) from None
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure, whole or not at all; raises OutputError."""
    with replaced_when_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    return path
