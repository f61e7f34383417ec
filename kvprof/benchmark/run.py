"""How fast does a plan's cache decode on this device, and how fast could it? Timed beside caches in full precision.

Reads a plan and what it is for; writes benchmark.json, and a journal of finished cases while it runs, so that a stopped
run goes on. Every case has baselines of its own, timed right after it. Does not know how a plan was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvprof import __version__
from kvprof.benchmark.bench import Bench
from kvprof.benchmark.cases import Cases
from kvprof.benchmark.hardware import describe_device, versions
from kvprof.benchmark.planned_attention import kinds_of
from kvprof.benchmark.subject import Subject
from kvprof.benchmark.timing import copy_bandwidth
from kvprof.errors import UsageError
from kvprof.models.config import DTYPES
from kvprof.models.inventory import position_limit
from kvprof.models.load import usable_device
from kvprof.models.memory import free_bytes
from kvprof.records.benchmark import (
    Benchmark,
    BenchmarkCase,
    BenchmarkedPlan,
    CopyBandwidth,
    DeviceInfo,
    LargestBatch,
)
from kvprof.records.costs import costs
from kvprof.records.document import LARGEST_COUNT
from kvprof.records.formats import TENSORS
from kvprof.records.geometry import DType
from kvprof.records.plan import BitPlan, quantized_tokens
from kvprof.records.requests.check import BenchmarkRequest
from kvprof.records.words import parse_memory
from kvprof.runtime.kernels.dispatch import kernels_named
from kvprof.storage.journal import Journal

CONTEXTS = {"cuda": (4096, 32_768, 131_072), "cpu": (1024, 4096)}
BATCHES = {"cuda": (1, 8), "cpu": (1,)}
"""What is timed where nothing else is asked for, by the device; of another one, what a CPU has."""
COPIES = 10
"""Copies of which the bandwidth is the median."""


@dataclass(frozen=True)
class BenchmarkRun:
    """A finished run: its results and the file they are in."""

    benchmark: Benchmark
    path: Path


def run_benchmark(
    subject: Subject,
    plan: BitPlan,
    request: BenchmarkRequest,
    folder: Path,
    name: str = "plan",
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BenchmarkRun:
    """Time a plan's cache and its baselines in full precision, and write benchmark.json.

    name: of the plan. folder: for the result, and for the journal of finished cases meanwhile. progress: called with
    (parts of cases done, parts in all).
    Raises UsageError, Mismatch for another model's plan, CacheError where the named kernels do not run here.
    """
    device = usable_device(request.device)
    kernels = kernels_named(request.kernels, device)
    plan = subject.fitted(plan)
    if any(subject.geometry.layers[entry.layer].is_latent for entry in plan.layers):
        raise UsageError(
            "kvprof benchmark times attention to keys and values as they are cached; this model has latent attention "
            "(MLA), which makes them of what is cached first."
        )
    digest = plan.digest
    dtype = _dtype(request.dtype, subject, device.type)
    geometry = subject.geometry.model_copy(update={"dtype": dtype})
    plan = plan.model_copy(update={"geometry": geometry})
    about, libraries = describe_device(device), versions(device)
    contexts = _contexts(request, subject, device.type)
    batches = tuple(dict.fromkeys(request.batch or _usual(BATCHES, device.type)))
    memory_bytes = about.memory_bytes if device.type == "cuda" else None
    if request.memory is not None:
        memory_bytes = parse_memory(request.memory)
    identity = {
        "model": subject.info.id,
        "plan": plan.recipe,
        "dtype": dtype,
        "device": about.model_dump(mode="json"),
        "kernels": kernels.name,
        "repeats": request.repeats,
        "tokens": request.steps,
        "seed": request.seed,
        "versions": libraries,
    }
    wanted = [(context, batch) for context in contexts for batch in batches]
    parts = 2 if request.steps is None else 4
    total = parts * len(wanted) + (0 if memory_bytes is None else 2)
    done = 0

    def tick(times: int = 1) -> None:
        nonlocal done
        done += times
        progress(done, total)

    if 2 * geometry.bytes_at(max(contexts), max(batches)) > LARGEST_COUNT:
        raise UsageError(f"{max(batches)} sequences of {max(contexts)} tokens are more than any memory holds.")
    tick(0)
    with Journal(folder / "benchmark.journal", identity, restart) as log:
        resumed = sum(_key(*case) in log.done for case in wanted)
        if "copy" not in log.done:
            found = copy_bandwidth(device, about.cache_bytes, free_bytes(device), COPIES)
            log.add("copy", found.model_dump(mode="json"))
        with log.understood():
            copied = CopyBandwidth.model_validate(log.done["copy"])
            for case in log.done.keys() & {_key(*case) for case in wanted}:
                BenchmarkCase.model_validate(log.done[case])
        bench = Bench(
            device,
            DTYPES[dtype],
            kernels,
            int(subject.text_config.num_attention_heads),
            about.cache_bytes,
            copied.bytes_per_second,
            request.repeats,
            request.seed,
        )
        cases = Cases(subject, plan, bench, request.steps, tick)
        for context, batch in wanted:
            if _key(context, batch) in log.done:
                tick(parts)
            else:
                log.add(_key(context, batch), cases.measure(context, batch).model_dump(mode="json"))
        results = [BenchmarkCase.model_validate(log.done[_key(*case)]) for case in wanted]
        largest = None
        if memory_bytes is not None:
            key = f"largest batch of {max(contexts)} in {memory_bytes}"
            if key not in log.done:
                log.add(key, cases.largest_batch(memory_bytes, max(contexts), results).model_dump(mode="json"))
            with log.understood():
                largest = LargestBatch.model_validate(log.done[key])
        tick(total - done)
        nominal_bits, stored_bits, _ = costs(plan, geometry)
        benchmark = Benchmark(
            kvprof_version=__version__,
            model=subject.info.model_copy(update={"fingerprint": plan.model.fingerprint}),
            dtype=dtype,
            random_weights=subject.is_random,
            device=about,
            versions=libraries,
            kernels=kernels.name,
            plan=BenchmarkedPlan(
                name=name, digest=digest, nominal_bits=nominal_bits, stored_bits=stored_bits, ceiling=16 / stored_bits
            ),
            planned_layers=len(plan.layers),
            skipped_layers=geometry.num_layers - len(plan.layers),
            copy_bandwidth=copied,
            cases=tuple(results),
            largest_batch=largest,
            remarks=tuple(_remarks(subject, plan, about, results, resumed)),
        )
        path = benchmark.save(folder / "benchmark.json")
        log.remove()
    return BenchmarkRun(benchmark, path)


def _dtype(asked: str, subject: Subject, device: str) -> DType:
    if asked != "auto":
        return asked  # type: ignore[return-value]  # checked before
    if subject.is_random:
        return "bfloat16" if device == "cuda" else "float32"
    return subject.geometry.dtype if subject.geometry.dtype in DTYPES else "float32"


def _contexts(request: BenchmarkRequest, subject: Subject, device: str) -> tuple[int, ...]:
    """Return the contexts asked for; else the device's usual ones, up to what the model was made for."""
    limit = None if request.context else _limit(subject)
    wanted = request.context or _usual(CONTEXTS, device)
    return tuple(dict.fromkeys(min(context, limit or context) for context in wanted))


def _usual(numbers: dict[str, tuple[int, ...]], device: str) -> tuple[int, ...]:
    return numbers.get(device, numbers["cpu"])


def _limit(subject: Subject) -> int | None:
    return position_limit(subject.text_config)


def _key(context: int, batch: int) -> str:
    return f"{context} x {batch}"


def _remarks(
    subject: Subject, plan: BitPlan, device: DeviceInfo, cases: Sequence[BenchmarkCase], resumed: int
) -> Iterator[str]:
    if resumed:
        yield f"went on with a stopped run: {resumed} of {len(cases)} cases were measured before"
    limit = _limit(subject)
    beyond = sorted({case.context for case in cases if limit is not None and case.context > limit})
    if beyond:
        numbers = ", ".join(map(str, beyond))
        yield f"{numbers} tokens are more than the {limit} that the model was made for: times hold, its words would not"
    forms = {entry.tensor(tensor) for entry in plan.layers for tensor in TENSORS}
    exact = sorted(
        {
            case.context
            for case in cases
            if not any(quantized_tokens(form, plan.window, case.context, form.recent_fraction) for form in forms)
        }
    )
    if exact:
        numbers = ", ".join(map(str, exact))
        yield f"at {numbers} tokens nothing is quantized: all is within the plan's window"
    small = sorted(
        {
            case.context
            for case in cases
            for run in (case.planned, *case.full)
            if run.buffer_bytes is not None and run.buffer_bytes <= 2 * device.cache_bytes
        }
    )
    if small:
        numbers = ", ".join(map(str, small))
        yield (
            f"at {numbers} tokens the rotating buffers do not exceed twice the device's cache: "
            "these times may be of the cache, not of the memory"
        )
    if getattr(subject.text_config, "attn_logit_softcapping", None):
        yield "attention is timed without the cap on its logits, in every cache"
    if len(kinds_of(plan)) > 1 and subject.geometry.num_layers < subject.whole.num_layers:
        yield f"only the first {subject.geometry.num_layers} of {subject.whole.num_layers} layers were kept"
