"""benchmark as a function: speed and memory of a plan's cache, or of one format everywhere, on this device.

Reads a plan and a model, or a published shape with random weights; writes benchmark.json.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from kvprof.api.job import Job
from kvprof.errors import UsageError
from kvprof.records.formats import TensorName, parse_formats
from kvprof.records.plan import BitPlan
from kvprof.records.requests.check import BenchmarkRequest

if TYPE_CHECKING:
    from kvprof.benchmark.run import BenchmarkRun


def benchmark_as_asked(request: BenchmarkRequest, plan: str, job: Job, command: str) -> BenchmarkRun:
    """Time a plan's cache and its baselines in full precision.

    plan: its file, or formats such as "key:int4g64,value:int2g64". command: for a plan of these.
    Raises UsageError for options that do not go together, Mismatch for another model's plan, InvalidFile.
    """
    if request.shape is not None and job.model is not None:
        raise UsageError("--shape takes random weights, and MODEL names a real model; leave out one of them.")
    if request.layers is not None and request.shape is None:
        raise UsageError("--layers keeps the first layers of a --shape; a real model has all of its own.")
    given = _plan_or_formats(plan)

    from kvprof.allocate.unscored import uniform_plan
    from kvprof.benchmark.run import run_benchmark
    from kvprof.benchmark.subject import random_subject, real_subject

    with contextlib.ExitStack() as stack:
        if request.shape is not None:
            subject = random_subject(request.shape, request.layers, request.seed)
        else:
            named = job.of_model(given.model.id if isinstance(given, BitPlan) else None)
            subject = real_subject(stack.enter_context(named.source()))
        if isinstance(given, BitPlan):
            obeyed, name = given, Path(plan).stem
        else:
            obeyed, name = uniform_plan(given, subject.info, subject.geometry, command=command), plan
        folder = stack.enter_context(job.folder(subject.info.id or "model"))
        return run_benchmark(subject, obeyed, request, folder, name, job.restart, job.progress)


def _plan_or_formats(word: str) -> BitPlan | dict[TensorName, tuple[str, ...]]:
    """Read the plan's file; where there is none, and the word is one of formats, those."""
    if "/" in word or "." in word or Path(word).exists():
        return BitPlan.load(word)
    try:
        return parse_formats(word)
    except UsageError as error:
        raise UsageError(f"there is no file {word}, and {error}") from None
