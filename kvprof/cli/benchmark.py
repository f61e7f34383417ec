"""The command that times a plan's cache on this device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli.options import Out, Restart, TrustRemoteCode
from kvprof.errors import UsageError

if TYPE_CHECKING:
    from kvprof.records.formats import TensorName
    from kvprof.records.plan import BitPlan

LARGEST_NUMBER = 2**31


def benchmark(
    plan: Annotated[
        str,
        typer.Argument(
            help="A BitPlan file; or formats for every layer: int4g64, or key:int4g64,value:int2g64 with 4 sinks and a "
            "window of 128 tokens."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            help="A hub id, a folder, a .gguf file, or `demo`.", show_default="the plan's own; else the demo model"
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of a model: random weights of a published shape, such as llama-2-7b, llama-3-8b, qwen3-8b.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Of a --shape, keep only so many layers, the first.", show_default="all")
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens in the cache: 4096,32768. Can be repeated.",
            show_default="4096,32768,131072 on a GPU; else 1024,4096; the model's own limit at most",
        ),
    ] = None,
    batch: Annotated[
        list[str] | None, typer.Option(help="Sequences, likewise.", show_default="1,8 on a GPU; else 1")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Bytes for weights and cache, such as 24GiB: which batch of the longest context fits, and how fast is "
            "it?",
            show_default="all that a GPU has; on a CPU not asked",
        ),
    ] = None,
    kernels: Annotated[
        str, typer.Option(help="`triton` reads codes in place, on a GPU; `torch` restores them first; `auto` chooses.")
    ] = "auto",
    repeats: Annotated[int, typer.Option(help="Times that attention is timed.")] = 30,
    tokens: Annotated[int, typer.Option(help="Decoding steps of the whole model that are timed.")] = 16,
    attention_only: Annotated[
        bool, typer.Option("--attention-only", help="Leave the whole model out: nothing needs its weights then.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random keys, values and weights.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (the checkpoint's own; of a --shape bfloat16 on a GPU, else float32), float32, bfloat16 or "
            "float16."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto (the GPU, else the CPU), cpu, cuda:1.")] = "auto",
    out: Out = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """How fast does the plan's cache decode on this device? Beside 16 bits, and what the memory's bandwidth allows."""
    if shape is not None and model is not None:
        raise UsageError("--shape takes random weights, and MODEL names a real model; leave out one of them.")
    if layers is not None and shape is None:
        raise UsageError("--layers keeps the first layers of a --shape; a real model has all of its own.")
    contexts, batches = _numbers(context, "--context"), _numbers(batch, "--batch")
    given = _plan_or_formats(plan)

    from kvprof.allocate.budget import parse_memory
    from kvprof.allocate.unscored import uniform_plan
    from kvprof.benchmark.run import BenchmarkSettings, check_settings, run_benchmark
    from kvprof.benchmark.subject import random_subject, real_subject
    from kvprof.models.load import resolve
    from kvprof.records.plan import BitPlan
    from kvprof.report.benchmarks import show_benchmark, show_benchmark_picture
    from kvprof.report.console import print_result, print_written, progress
    from kvprof.storage.folders import output_folder

    settings = BenchmarkSettings(
        contexts=contexts,
        batches=batches,
        memory_bytes=None if memory is None else parse_memory(memory),
        dtype=dtype,
        device=device,
        kernels=kernels,
        repeats=repeats,
        steps=None if attention_only else tokens,
        seed=seed,
    )
    check_settings(settings)
    if shape is not None:
        subject = random_subject(shape, layers, seed)
    else:
        named = model or (given.model.id if isinstance(given, BitPlan) else None)
        subject = real_subject(resolve(named, trust_remote_code))
    if isinstance(given, BitPlan):
        obeyed, name = given, Path(plan).stem
    else:
        command = " ".join(["kvprof", *sys.argv[1:]])
        obeyed, name = uniform_plan(given, subject.info, subject.geometry, command=command), plan
    folder = output_folder(subject.info.id or "model", out)
    with progress("benchmark", "parts") as advance:
        run = run_benchmark(subject, obeyed, settings, folder, name, restart, advance)
    show_benchmark(run.benchmark)
    print_written(run.path)
    show_benchmark_picture(run.benchmark, folder / "plots")
    print_result(run.benchmark)


def _plan_or_formats(word: str) -> BitPlan | dict[TensorName, tuple[str, ...]]:
    """Read the plan's file; where there is none, and the word is one of formats, those."""
    from kvprof.records.formats import parse_formats
    from kvprof.records.plan import BitPlan

    if "/" in word or "." in word or Path(word).exists():
        return BitPlan.load(word)
    try:
        return parse_formats(word)
    except UsageError as error:
        raise UsageError(f"there is no file {word}, and {error}") from None


def _numbers(texts: list[str] | None, option: str) -> tuple[int, ...] | None:
    """Return the whole numbers of a list with commas, given once or several times, none twice."""
    if texts is None:
        return None
    numbers = []
    for word in ",".join(texts).split(","):
        if not word.strip().isdecimal() or not 1 <= int(word) <= LARGEST_NUMBER:
            raise UsageError(
                f"{option} {word.strip() or 'with nothing'}: write whole numbers of at least 1: 1024,4096."
            )
        numbers.append(int(word))
    return tuple(dict.fromkeys(numbers))
