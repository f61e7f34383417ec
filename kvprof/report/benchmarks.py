"""A Benchmark printed: attention by context and batch, whole steps, the largest batch, and what the bytes allow.

Reads a Benchmark, prints it through `console` in 80 columns; knows nothing of how it was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvprof.records.benchmark import (
    CACHES,
    AttentionRun,
    Benchmark,
    BenchmarkCase,
    DecodeRun,
    FittedCache,
    LargestBatch,
    Timing,
)
from kvprof.records.geometry import bytes_text
from kvprof.records.words import counted
from kvprof.report.console import Table, print_note, print_plain, print_written
from kvprof.report.plots.benchmark import benchmark_figure
from kvprof.report.plots.style import MissingMatplotlib, NothingToDraw, save_figure


def show_benchmark(benchmark: Benchmark) -> None:
    """Print the device, every table, a verdict for each case, and remarks."""
    for line in benchmark_lines(benchmark):
        print_plain(line)
    for case in benchmark.cases:
        if any(run.timing for run in (case.planned, *case.full)):
            _show_attention(case)
    if any(run.timing for case in benchmark.cases for run in case.decode):
        _show_decode(benchmark)
    if benchmark.largest_batch is not None:
        _show_largest(benchmark.largest_batch)
    for line in (*reasons(benchmark), *benchmark.remarks):
        print_note(line)


def show_benchmark_picture(benchmark: Benchmark, folder: Path) -> None:
    """Draw time against context and say where; without matplotlib, or anything to draw, say that."""
    path = folder / "benchmark.png"
    path.unlink(missing_ok=True)  # of a benchmark that is no more
    try:
        print_written(save_figure(benchmark_figure(benchmark), path))
    except (MissingMatplotlib, NothingToDraw) as error:
        print_note(f"no picture: {error}")


def benchmark_lines(benchmark: Benchmark) -> list[str]:
    """Return what was timed, on what, and what the plan's bytes allow."""
    device, plan, copied = benchmark.device, benchmark.plan, benchmark.copy_bandwidth
    facts = [f"{bytes_text(device.memory_bytes)} of memory"] if device.memory_bytes else []
    facts += [f"cache {bytes_text(device.cache_bytes)}"]
    facts += [counted(device.threads, "thread")] if device.threads else []
    facts += [f"compute capability {device.compute_capability}"] if device.compute_capability else []
    random = ", random weights" if benchmark.random_weights else ""
    layers = f"{benchmark.planned_layers} planned layers"
    if benchmark.skipped_layers:
        layers += f" (the {benchmark.skipped_layers} others, the same in every cache, are left out of it)"
    return [
        f"{plan.name} on {benchmark.model.id or 'a model'} ({benchmark.dtype}{random}), kernels: {benchmark.kernels}",
        f"{device.type}: {device.name}; {', '.join(facts)}",
        ", ".join(f"{name} {version}" for name, version in benchmark.versions.items()),
        f"a copy within memory: {copied.bytes_per_second / 1e9:#.3g} GB/s read and written, "
        f"of {bytes_text(copied.buffer_bytes)}",
        f"attention is of a token's step through {layers}; medians",
        f"{plan.stored_bits:.4g} stored bits an element: 16 / {plan.stored_bits:.4g} = {plan.ceiling:.2f} times fewer "
        "bytes in a long context, the most that attention can gain",
    ]


def case_verdict(case: BenchmarkCase) -> str | None:
    """Return one line on what a plan gains at a context and batch, and what it could; None where nothing was timed."""
    best = case.best_full
    if case.speedup is None or best is None:
        return None
    gain = (
        f"{_digits(case.speedup)} times as fast as"
        if case.speedup >= 1
        else f"{_digits(1 / case.speedup)} times slower than"
    )
    return f"{gain} {best.name} ({best.dtype}); {case.ceiling:.2f} times fewer bytes than at 16 bits"


def _show_attention(case: BenchmarkCase) -> None:
    sequences = counted(case.batch, "sequence")
    table = Table(
        f"decode attention at {case.context} tokens, {sequences}",
        ("cache", "dtype", "ms a\nstep", "10-90 %", "MiB", "GB/s", "% of\ncopy", "times\nplan's"),
        left=[0, 1],
    )
    for run in (case.planned, *case.full):
        if run.timing is not None:
            table.add(*_attention_cells(run, case), style="bold" if run is case.planned else "")
    table.print()
    if (verdict := case_verdict(case)) is not None:
        print_plain(verdict, style="bold")
    if case.append is not None:
        print_plain(
            f"adding a token, packing and all: {_milliseconds(case.append.seconds)} ms, {case.append.share:.1%} of "
            + ("a step of the whole model" if any(run.timing for run in case.decode) else "attention and itself")
        )


def _show_decode(benchmark: Benchmark) -> None:
    peak = "peak\nallocated" if benchmark.device.type == "cuda" else "process\ngrew by"
    table = Table(
        "the whole model, a token for each sequence in a step",
        ("context", "batch", "cache", "ms a\nstep", "10-90 %", "tokens\n/s", "cache\nholds", peak),
        left=[2],
    )
    for case in benchmark.cases:
        for run in (run for run in case.decode if run.timing is not None):
            table.add(str(case.context), *_decode_cells(run), style="bold" if run.cache == "PlanCache" else "")
    table.print()
    for case in benchmark.cases:
        planned, full = (case.decoding(name) for name in CACHES)
        if planned and full and planned.tokens_per_second and full.tokens_per_second:
            ratio = planned.tokens_per_second / full.tokens_per_second
            print_plain(f"{case.context} x {case.batch}: {_digits(ratio)} times the tokens a second of DynamicCache")


def _show_largest(largest: LargestBatch) -> None:
    table = Table(
        f"the largest batch of {largest.context} tokens in {bytes_text(largest.memory_bytes)}, "
        f"{bytes_text(largest.weight_bytes)} of it weights",
        ("cache", "batch", "cache\nholds", "working\nmemory", "tokens/s"),
        left=[0],
    )
    for fitted in (largest.planned, largest.full):
        table.add(*_fitted_cells(fitted), style="bold" if fitted is largest.planned else "")
    table.print()
    parts = []
    if largest.batch_ratio is not None:
        parts.append(f"{largest.batch_ratio:.2f} times as many sequences")
    if largest.throughput_ratio is not None:
        parts.append(f"{_digits(largest.throughput_ratio)} times the tokens a second")
    if parts:
        print_plain("PlanCache: " + ", ".join(parts), style="bold")


def reasons(benchmark: Benchmark) -> list[str]:
    """Say why there is no time, or not that of the fused kernels: each reason once, with all that it holds for."""
    missing: dict[tuple[str, str], list[str]] = {}
    for case in benchmark.cases:
        here = f"{case.context} x {case.batch}"
        for run in (case.planned, *case.full):
            if run.reason is not None:
                missing.setdefault((f"no time of {run.name} in {run.dtype}", run.reason), []).append(here)
            if run.unpacked is not None:
                missing.setdefault((f"{run.name} restores codes before it attends", run.unpacked), []).append(here)
        for decoded in case.decode:
            if decoded.reason is not None:
                missing.setdefault((f"no step of the whole model with {decoded.cache}", decoded.reason), []).append(
                    here
                )
    everywhere = len(benchmark.cases)
    lines = [
        f"{what}{'' if len(places) == everywhere else f' at {_listed(places)}'}: {why}"
        for (what, why), places in missing.items()
    ]
    if benchmark.largest_batch is not None:
        for fitted in (benchmark.largest_batch.planned, benchmark.largest_batch.full):
            lines += _fitted_reasons(fitted)
    return lines


def _fitted_reasons(fitted: FittedCache) -> Iterator[str]:
    if fitted.lowered_from is not None:
        yield f"{fitted.cache}: {fitted.lowered_from} sequences fit by count, {fitted.batch} on the device"
    if fitted.run is not None and fitted.run.reason is not None:
        yield f"the largest batch with {fitted.cache} was not timed: {fitted.run.reason}"
    if fitted.batch == 0:
        yield f"with {fitted.cache} not one sequence fits beside the weights"


def _listed(places: list[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def _attention_cells(run: AttentionRun, case: BenchmarkCase) -> list[str]:
    assert run.timing is not None
    faster = "-"
    if run is not case.planned and case.planned.timing is not None and case.planned.timing.median_seconds:
        faster = _digits(run.timing.median_seconds / case.planned.timing.median_seconds)
    return [
        run.name,
        run.dtype,
        _milliseconds(run.timing.median_seconds),
        _spread(run.timing),
        _digits(run.bytes / 2**20),
        "-" if run.bytes_per_second is None else _digits(run.bytes_per_second / 1e9),
        "-" if run.copy_fraction is None else f"{100 * run.copy_fraction:.0f}",
        faster,
    ]


def _decode_cells(run: DecodeRun) -> list[str]:
    assert run.timing is not None
    return [
        str(run.batch),
        run.cache,
        _milliseconds(run.timing.median_seconds),
        _spread(run.timing),
        _digits(run.tokens_per_second or 0.0),
        bytes_text(run.cache_bytes),
        "-" if run.peak_bytes is None else bytes_text(run.peak_bytes),
    ]


def _fitted_cells(fitted: FittedCache) -> list[str]:
    rate = None if fitted.run is None else fitted.run.tokens_per_second
    return [
        fitted.cache,
        str(fitted.batch),
        bytes_text(fitted.cache_bytes),
        bytes_text(fitted.working_bytes),
        "-" if rate is None else _digits(rate),
    ]


def _milliseconds(seconds: float) -> str:
    return _digits(1e3 * seconds)


def _digits(number: float) -> str:
    """Return three digits of a number, two of a small one, all where there are more before the point."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}" if number >= 0.1 else f"{number:#.2g}"


def _spread(timing: Timing) -> str:
    return "-".join(_two_digits(1e3 * seconds) for seconds in (timing.fast_seconds, timing.slow_seconds))


def _two_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 9.95 else f"{number:#.2g}"
