"""A picture of a Benchmark: time against context, a panel for each batch, with the limit that the bytes set.

Reads a Benchmark. Does not know how anything was timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvprof.records.benchmark import AttentionRun, Benchmark, BenchmarkCase
from kvprof.records.words import context_text, counted
from kvprof.report.plots.layers import light_grid, plain_log
from kvprof.report.plots.legends import legend_at_side, legend_height
from kvprof.report.plots.style import (
    ACCENT,
    FULL_WIDTH,
    GREY,
    OTHER_MARKS,
    OTHERS,
    PAPER,
    NothingToDraw,
    Page,
    cut_text,
    in_paper_style,
    model_name,
    new_figure,
    set_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_A_ROW = 2
PANEL_WIDTH = 2.4
"""Inches, at least."""
LEGEND_WIDTH = 1.6
"""Inches of the legend at the side; a picture with no room for it has it below."""


@in_paper_style
def benchmark_figure(benchmark: Benchmark, page: Page = PAPER) -> Figure:
    """Draw each way of attending, and how long a copy of its bytes would take.

    Raises NothingToDraw where no attention was timed, MissingMatplotlib.
    """
    if not any(case.planned.timing for case in benchmark.cases):
        raise NothingToDraw("no attention was timed: there is no time to draw.")
    batches = sorted({case.batch for case in benchmark.cases})
    width = page.width_or(FULL_WIDTH)
    beside = width >= PANEL_WIDTH + LEGEND_WIDTH
    columns = min(len(batches), PANELS_A_ROW, max(1, int((width - LEGEND_WIDTH * beside) // PANEL_WIDTH)))
    rows = -(-len(batches) // columns)
    names = dict.fromkeys((run.name, run.dtype) for case in benchmark.cases for run in case.full if run.timing)
    figure = new_figure(width, legend_height(len(names) + 3, 0.6 + 2.5 * rows, beside), page)
    plan = benchmark.plan
    title = (
        f"{cut_text(plan.name, 40)} on {model_name(benchmark.model, 40)}, {plan.stored_bits:.2f} stored bits\n"
        f"{cut_text(benchmark.device.name, 50)}: {benchmark.copy_bandwidth.bytes_per_second / 1e9:.3g} GB/s copied"
    )
    set_title(figure, title, page)
    styles: dict[tuple[str, str], tuple[str, str]] = {
        name: (OTHERS[number % len(OTHERS)], OTHER_MARKS[number % len(OTHER_MARKS)])
        for number, name in enumerate(names)
    }
    shown: dict[str, Any] = {}
    for number, batch in enumerate(batches, start=1):
        axes = figure.add_subplot(rows, columns, number)
        cases = sorted((case for case in benchmark.cases if case.batch == batch), key=lambda case: case.context)
        _panel(axes, cases, styles, benchmark.copy_bandwidth.bytes_per_second)
        axes.set_title(counted(batch, "sequence"))
        axes.set_ylabel(f"decode attention, {benchmark.planned_layers} layers\n(ms per step)")
        shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = {label: shown[label] for label in sorted(shown, key=lambda label: label.startswith("limit"))}
    legend_at_side(figure, list(shown.values()), list(shown), beside)
    return figure


def _panel(
    axes: Axes, cases: Sequence[BenchmarkCase], styles: dict[tuple[str, str], tuple[str, str]], copy_rate: float
) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")

    def line(pick: Callable[[BenchmarkCase], AttentionRun | None], colour: str, marker: str, label: str) -> None:
        points = [(case.context, run.timing) for case in cases if (run := pick(case)) is not None and run.timing]
        if points:
            axes.errorbar(
                [context for context, _ in points],
                [1e3 * timing.median_seconds for _, timing in points],
                yerr=[
                    [1e3 * (timing.median_seconds - timing.fast_seconds) for _, timing in points],
                    [1e3 * (timing.slow_seconds - timing.median_seconds) for _, timing in points],
                ],
                color=colour,
                marker=marker,
                linewidth=1.4 if colour == ACCENT else 1.0,
                elinewidth=0.7,
                capsize=1.5,
                label=label,
                zorder=4 if colour == ACCENT else 3,
            )

    line(lambda case: case.planned, ACCENT, "o", cases[0].planned.name)
    for (name, dtype), (colour, marker) in styles.items():

        def pick(case: BenchmarkCase, wanted: tuple[str, str] = (name, dtype)) -> AttentionRun | None:
            return next((run for run in case.full if (run.name, run.dtype) == wanted), None)

        line(pick, colour, marker, f"{name}, {dtype}")
    contexts = [case.context for case in cases]
    limits = {
        "limit: 16 bits copied": (":", [min((run.bytes for run in case.full), default=0) for case in cases]),
        "limit: PlanCache copied": ("--", [case.planned.bytes for case in cases]),
    }
    for label, (style, counts) in limits.items():
        known = [(context, count) for context, count in zip(contexts, counts, strict=True) if count]
        if known:
            axes.plot(
                [context for context, _ in known],
                [1e3 * count / copy_rate for _, count in known],
                color=GREY,
                linestyle=style,
                marker="_",
                linewidth=1.0,
                label=label,
                zorder=2,
            )
    axes.set_xticks(contexts, [context_text(context) for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)")
    light_grid(axes, "both")
    plain_log(axes.yaxis)
