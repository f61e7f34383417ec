"""A picture of a Benchmark: time against context, a panel for each batch, with the limit that the bytes set.

Reads a Benchmark, writes a PNG file. Does not know how anything was timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprof.records.benchmark import AttentionRun, Benchmark, BenchmarkCase
from kvprof.report.plots import cut_text, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS_A_ROW = 2
PLANNED_COLOUR = "#D55E00"
FULL_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#606060")
"""Of Okabe and Ito, as the plan's vermilion is: told apart by colour-blind eyes; markers differ too."""
FULL_MARKERS = "sD^vP*X<>"
LIMIT_COLOUR = "#606060"


def draw_benchmark(benchmark: Benchmark, path: Path) -> Path:
    """Draw each way of attending, and how long a copy of its bytes would take; return the file.

    Raises MissingMatplotlib, OutputError.
    """
    batches = sorted({case.batch for case in benchmark.cases})
    columns = min(len(batches), PANELS_A_ROW)
    rows = -(-len(batches) // columns)
    figure = new_figure(2.6 + 4.9 * columns, 1.3 + 4.4 * rows)
    plan = benchmark.plan
    figure.suptitle(
        f"{cut_text(plan.name, 30 * columns)} on {cut_text(benchmark.model.id or 'a model', 30 * columns)}, "
        f"{plan.stored_bits:.2f} stored bits\n"
        f"{cut_text(benchmark.device.name, 60)}: {benchmark.copy_bandwidth.bytes_per_second / 1e9:.3g} GB/s copied",
        fontsize=11,
    )
    names = dict.fromkeys((run.name, run.dtype) for case in benchmark.cases for run in case.full if run.timing)
    styles: dict[tuple[str, str], tuple[str, str]] = {
        name: (FULL_COLOURS[number % len(FULL_COLOURS)], FULL_MARKERS[number % len(FULL_MARKERS)])
        for number, name in enumerate(names)
    }
    shown: dict[str, Any] = {}
    for number, batch in enumerate(batches, start=1):
        axes = figure.add_subplot(rows, columns, number)
        cases = sorted((case for case in benchmark.cases if case.batch == batch), key=lambda case: case.context)
        _panel(axes, cases, styles, benchmark.copy_bandwidth.bytes_per_second)
        axes.set_title(f"{batch} sequence{'s' if batch > 1 else ''}", fontsize=11)
        axes.set_ylabel(f"decode attention, ms a step of {benchmark.planned_layers} layers")
        shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = {label: shown[label] for label in sorted(shown, key=lambda label: label.startswith("limit"))}
    figure.legend(shown.values(), shown.keys(), loc="outside right center", fontsize=9, frameon=False)
    return save_figure(figure, path)


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
                markersize=6,
                linewidth=1.6 if colour == PLANNED_COLOUR else 1.1,
                elinewidth=0.8,
                capsize=2,
                label=label,
                zorder=4 if colour == PLANNED_COLOUR else 3,
            )

    line(lambda case: case.planned, PLANNED_COLOUR, "o", cases[0].planned.name)
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
                color=LIMIT_COLOUR,
                linestyle=style,
                marker="_",
                linewidth=1.2,
                label=label,
                zorder=2,
            )
    axes.set_xticks(contexts, [_tokens(context) for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")
    axes.grid(visible=True, which="major", color="#D8D8D8", linewidth=0.5)
    axes.set_axisbelow(True)
    _plain_numbers(axes)


def _plain_numbers(axes: Axes) -> None:
    """Write 0.2, 5, 100 on the logarithmic axis rather than powers of ten, and few enough of them."""
    from matplotlib.ticker import LogLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")


def _tokens(context: int) -> str:
    return f"{context // 1024}k" if context >= 1024 and context % 1024 == 0 else str(context)
