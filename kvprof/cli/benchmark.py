"""The command `benchmark`: speed and memory of a plan's cache on this device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli.options import Out, Restart, TrustRemoteCode, within
from kvprof.errors import UsageError
from kvprof.records.requests.option import DEVICE, MEASUREMENT

if TYPE_CHECKING:
    from kvprof.records.formats import TensorName
    from kvprof.records.plan import BitPlan

LARGEST_NUMBER = 2**31


def benchmark(
    plan: Annotated[
        str,
        typer.Argument(
            help="BitPlan file; or formats for all layers, int4g64 or key:int4g64,value:int2g64, with 4 sinks and a "
            "window of 128 tokens."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub id, folder, .gguf file, or `demo`.",
            show_default="the plan's model; if it names none, the demo model",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of MODEL: random weights of a published shape, such as llama-2-7b, llama-3-8b, qwen3-8b.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens in the cache, such as 4096,32768. Can be repeated.",
            show_default="4096,32768,131072 on a GPU; else 1024,4096; no more than the model's limit",
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="Sequences in a batch, such as 1,8. Can be repeated.", show_default="1,8 on a GPU; else 1"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Bytes for weights and cache, such as 24GiB: find and time the largest batch of the longest context "
            "that fits.",
            show_default="all of the GPU's; on a CPU none, and no batch is sought",
        ),
    ] = None,
    out: Out = None,
    repeats: Annotated[int, typer.Option(help="Number of timings of attention.", rich_help_panel=MEASUREMENT)] = 30,
    tokens: Annotated[
        int, typer.Option(help="Number of decoding steps of the whole model to time.", rich_help_panel=MEASUREMENT)
    ] = 16,
    attention_only: Annotated[
        bool,
        typer.Option(
            "--attention-only", help="Time attention alone; no weights are needed.", rich_help_panel=MEASUREMENT
        ),
    ] = False,
    kernels: Annotated[
        str,
        typer.Option(
            help="`triton` reads codes in place, on a GPU; `torch` dequantizes them first; `auto` chooses.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = "auto",
    layers: Annotated[
        int | None,
        typer.Option(help="Keep only the first layers of --shape.", show_default="all", rich_help_panel=DEVICE),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            callback=within(0, 2**32 - 1),
            help="Seed of random keys, values and weights.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, or auto: the checkpoint's; for --shape bfloat16 on a GPU, else float32.",
            rich_help_panel=DEVICE,
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda:1, or auto: the GPU, else the CPU.", rich_help_panel=DEVICE)
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure a plan's decoding speed and memory on this device.

    Compared with a 16-bit cache, and with what the memory bandwidth allows.
    """
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
