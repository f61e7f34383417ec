"""The command `benchmark`: speed and memory of a plan's cache on this device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli.options import Out, PlannedModelArgument, Restart, TrustRemoteCode
from kvprof.cli.request import asks
from kvprof.cli.watching import watched

if TYPE_CHECKING:
    from kvprof.records.requests.check import BenchmarkRequest


@asks("check.BenchmarkRequest")
def benchmark(
    plan: Annotated[
        str,
        typer.Argument(
            help="BitPlan file; or formats for all layers, int4g64 or key:int4g64,value:int2g64, with 4 sinks and a "
            "window of 128 tokens."
        ),
    ],
    model: PlannedModelArgument = None,
    *,
    request: BenchmarkRequest,
    out: Out = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure a plan's decoding speed and memory on this device.

    Compared with a 16-bit cache, and with what the memory bandwidth allows.
    """
    from kvprof.api.benchmark import benchmark_as_asked
    from kvprof.report.benchmarks import show_benchmark, show_benchmark_picture
    from kvprof.report.console import print_result, print_written

    with watched(
        "benchmark", "parts", request.device, model=model, trust_remote_code=trust_remote_code, out=out, restart=restart
    ) as job:
        run = benchmark_as_asked(request, plan, job, " ".join(["kvprof", *sys.argv[1:]]))
    show_benchmark(run.benchmark)
    print_written(run.path)
    show_benchmark_picture(run.benchmark, run.path.parent / "plots")
    print_result(run.benchmark)
