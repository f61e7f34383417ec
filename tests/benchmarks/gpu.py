"""Check a GPU in under ten minutes: is the cache right there, how fast is it, and beside what?

python tests/benchmarks/gpu.py OUT [--only PART]... [--skip PART]... [--toy]

Needs torch, Triton, transformers, pydantic and pytest, no network and no weights: models are random, of published
shapes. Writes OUT/benchmark.json after each part, so that a cut loses only the rest, and prints a table of it. --toy
runs every part at toy sizes on a CPU, its kernels under Triton's interpreter: it shows that the program runs.
The exit status is 1 where a test of the kernels fails or a part ends in an error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_losses import forward_and_backward
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from kvprof.allocate.unscored import uniform_plan
from kvprof.benchmark.decode import DecodeSettings, fill, time_decode
from kvprof.benchmark.hardware import describe_device
from kvprof.benchmark.run import run_benchmark
from kvprof.benchmark.subject import Subject, random_subject
from kvprof.benchmark.timing import time_calls
from kvprof.calibration.sequences import Batch
from kvprof.models.decoder import cache_argument
from kvprof.profile.decoder import usual_formats
from kvprof.profile.loss_increase import loss_effects
from kvprof.records.benchmark import AttentionRun, Benchmark, DecodeRun
from kvprof.records.formats import TENSORS, format_named, parse_formats
from kvprof.records.plan import USUAL_WINDOW, BitPlan, LayerPlan, Quantizer, TensorPlan
from kvprof.records.requests.check import BenchmarkRequest
from kvprof.runtime import PlanCache

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("test_gpu.py", "test_triton_kernels.py", "test_hook.py")
MIXED_KEYS = ("int3g128", "int2g128", "int3g128", "int2g64")
MIXED_VALUES = ("rot2", "int2g128", "rot2", "int2g128")
"""Layer by layer, over and over again: 2.5 stored bits at 128 numbers a head, as a measured plan mixes them."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: models by shape with the layers that are kept (None: all), contexts, batches, memory.

    mixed: formats of keys and of values, layer by layer.
    """

    attention: tuple[str, int | None]
    cases: tuple[tuple[int, int], ...]
    step: tuple[int, int]
    throughput: tuple[str, int | None]
    throughput_context: int
    memory: str | None
    gradients: tuple[str, int | None]
    tokens: int
    repeats: int
    steps: int
    mixed: tuple[tuple[str, ...], tuple[str, ...]]
    four_bits: str


REAL = Sizes(
    attention=("llama-3.1-8b", None),
    cases=((32_768, 8), (131_072, 1)),
    step=(32_768, 8),
    throughput=("llama-2-7b", None),
    throughput_context=4096,
    memory="80GiB",
    gradients=("llama-3.2-1b", None),
    tokens=1024,
    repeats=30,
    steps=16,
    mixed=(MIXED_KEYS, MIXED_VALUES),
    four_bits="int4g128",
)
TOY = Sizes(
    attention=("smollm2-135m", 1),
    cases=((200, 1),),
    step=(200, 1),
    throughput=("smollm2-135m", 1),
    throughput_context=140,
    memory=None,
    gradients=("smollm2-135m", 1),
    tokens=64,
    repeats=1,
    steps=1,
    mixed=(("int3g64", "int2g64"), ("rot2", "int2g64")),
    four_bits="int4g64",
)


@dataclass(frozen=True)
class Check:
    """One run: where, at which sizes, and where its files go."""

    device: torch.device
    sizes: Sizes
    folder: Path
    is_toy: bool

    @property
    def dtype(self) -> torch.dtype:
        """What models are in."""
        return torch.float32 if self.is_toy else torch.bfloat16

    @property
    def kernels(self) -> str:
        """What reads codes: of a toy run Triton's, where their interpreter is asked for."""
        return "triton" if not self.is_toy or os.environ.get("TRITON_INTERPRET") == "1" else "torch"

    def model(self, shape: tuple[str, int | None]) -> PreTrainedModel:
        """Return a random model."""
        return random_subject(*shape).make(str(self.dtype).removeprefix("torch."), self.device)

    def timed(self, plan: BitPlan, subject: Subject, name: str, **options: Any) -> Benchmark:
        """Return what `kvprof benchmark` measures of a plan."""
        asked = BenchmarkRequest(device=str(self.device), repeats=self.sizes.repeats, kernels=self.kernels, **options)
        return run_benchmark(subject, plan, asked, self.folder / name, name, restart=True).benchmark


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", action="append", choices=PARTS, default=[])
    parser.add_argument("--skip", action="append", choices=PARTS, default=[])
    parser.add_argument("--toy", action="store_true")
    asked = parser.parse_args(words)
    if not asked.toy and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --toy runs every part on the CPU, at toy sizes")
    device = torch.device("cpu" if asked.toy else "cuda")
    check = Check(device, TOY if asked.toy else REAL, asked.out, asked.toy)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "benchmark.json"
    results: dict[str, Any] = {
        "device": describe_device(device).model_dump(mode="json"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "toy": asked.toy,
        "parts": {},
    }
    wanted = [name for name in PARTS if (not asked.only or name in asked.only) and name not in asked.skip]
    for name in wanted:
        start = time.monotonic()
        print(f"\n## {name}", flush=True)
        rows: list[dict[str, Any]] = []
        part: dict[str, Any] = {"rows": rows}
        try:
            for row in PARTS[name](check):
                rows.append(row)
                print("  ".join(f"{word}: {_short(value)}" for word, value in row.items()), flush=True)
        except Exception as error:  # the parts that follow shall still be measured
            traceback.print_exc()
            part["error"] = f"{type(error).__name__}: {error}"
        part["seconds"] = round(time.monotonic() - start, 1)
        results["parts"][name] = part
        _write(path, results)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{table(results)}\n\nwritten to {path}")
    return 1 if any("error" in part for part in results["parts"].values()) else 0


def tests(check: Check) -> Iterator[dict[str, Any]]:
    """Packing to the bit, attention within float64's, on this device; under the interpreter they are in the suite."""
    files = [str(ROOT / "tests/runtime" / name) for name in (TESTS[:1] if check.is_toy else TESTS)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *files]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    said = found.stdout.strip().splitlines()
    yield {"files": len(files), "said": said[-1] if said else found.stderr[-200:]}
    if found.returncode != 0:
        print(found.stdout[-4000:])
        raise RuntimeError("tests of the kernels failed")


def attention(check: Check) -> Iterator[dict[str, Any]]:
    """A decoding step's attention to packed codes, beside every way to attend in 16 bits and a copy; and appending."""
    subject = random_subject(*check.sizes.attention)
    for name, plan in plans(check, subject).items():
        for context, batch in check.sizes.cases:
            found = check.timed(plan, subject, name, context=(context,), batch=(batch,), attention_only=True)
            (case,) = found.cases
            yield {
                "plan": name,
                "stored bits": found.plan.stored_bits,
                "context": context,
                "batch": batch,
                "planned ms": _milliseconds(case.planned),
                "of a copy's rate": case.planned.copy_fraction or case.planned.reason,
                **{f"{run.name} ms": _milliseconds(run) for run in case.full},
                "times faster than the best in 16 bits": case.speedup,
                "appending ms": None if case.append is None else 1e3 * case.append.seconds,
            }


def step(check: Check) -> Iterator[dict[str, Any]]:
    """A whole decoding step with each cache, and with the step recorded as a CUDA graph where that works."""
    context, batch = check.sizes.step
    model = check.model(check.sizes.attention)
    settings = DecodeSettings(context, batch, check.sizes.steps, seed=0)
    room = settings.tokens_held + 1
    own = model.config._attn_implementation
    makers: dict[str, Callable[[], Cache]] = {
        "StaticCache": lambda: StaticCache(config=model.config, max_cache_len=room),
        "DynamicCache": lambda: DynamicCache(config=model.config),
    }
    for name, plan in plans(check, random_subject(*check.sizes.attention)).items():
        makers[f"PlanCache, {name}"] = lambda plan=plan: PlanCache.from_plan(plan, model, check.kernels)
    for name, make in makers.items():
        kind = "PlanCache" if name.startswith("PlanCache") else "DynamicCache"
        found = time_decode(model, kind, make, 0, settings)
        model.set_attn_implementation(own)
        yield {"cache": name, **_decoding(found)}
    if check.device.type == "cuda":
        yield {"cache": "StaticCache in a CUDA graph", **graphed(model, makers["StaticCache"](), settings, check)}


def graphed(model: PreTrainedModel, cache: Cache, settings: DecodeSettings, check: Check) -> dict[str, Any]:
    """Return the time of a step that a CUDA graph replays, or why it cannot be recorded."""
    ids = torch.zeros(settings.batch, 1, dtype=torch.long, device=check.device)
    argument = cache_argument(model)
    try:
        with torch.inference_mode():
            fill(cache, model, settings)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(2):
                    model(input_ids=ids, use_cache=True, **{argument: cache})
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(input_ids=ids, use_cache=True, **{argument: cache})
            timing = time_calls([graph.replay], check.device, settings.steps, hides_host=False)
    except Exception as error:  # of a model's own code, which may ask the host something in between
        return {"not": str(error).splitlines()[0]}
    return {"ms": 1e3 * timing.median_seconds, "tokens a second": settings.batch / timing.median_seconds}


def throughput(check: Check) -> Iterator[dict[str, Any]]:
    """Tokens a second of each cache at the largest batch that one memory holds."""
    subject = random_subject(*check.sizes.throughput)
    plan = plans(check, subject)["mixed"]
    context = check.sizes.throughput_context
    found = check.timed(
        plan, subject, "throughput", context=(context,), batch=(1,), memory=check.sizes.memory, tokens=4
    )
    if found.largest_batch is None:
        for run in found.cases[0].decode:
            yield {"cache": run.cache, **_decoding(run)}
        return
    largest = found.largest_batch
    for fitted in (largest.planned, largest.full):
        fits = {"cache": fitted.cache, "batch": fitted.batch, "cache bytes": fitted.cache_bytes}
        yield fits | ({} if fitted.run is None else _decoding(fitted.run))
    yield {
        "cache": "PlanCache over DynamicCache",
        "batch": largest.batch_ratio,
        "tokens a second": largest.throughput_ratio,
    }


def gradients(check: Check) -> Iterator[dict[str, Any]]:
    """Predicted losses of the usual formats, beside a bare forward and backward of the same tokens."""
    subject = random_subject(*check.sizes.gradients)
    model = check.model(check.sizes.gradients)
    ids = torch.randint(0, subject.text_config.vocab_size, (1, check.sizes.tokens), device=check.device)
    batch = Batch((0,), ids, torch.ones_like(ids), ids)
    formats = {
        (layer.layer, tensor): usual_formats(layer, tensor) for layer in subject.geometry.planned for tensor in TENSORS
    }

    def plain() -> None:
        forward_and_backward(model, batch)

    def scores() -> None:
        loss_effects(model, batch, formats, USUAL_WINDOW, Quantizer(), 0.5, seed=0)

    bare, ours = (time_calls([call], check.device, 2, hides_host=False).median_seconds for call in (plain, scores))
    yield {
        "tokens": check.sizes.tokens,
        "forward and backward s": bare,
        "predicted losses s": ours,
        "ratio": ours / bare,
    }


PARTS: dict[str, Callable[[Check], Iterator[dict[str, Any]]]] = {
    "tests": tests,
    "attention": attention,
    "step": step,
    "throughput": throughput,
    "gradients": gradients,
}


def plans(check: Check, subject: Subject) -> dict[str, BitPlan]:
    """Return the plans that are timed: 4 bits everywhere, and formats that differ layer by layer."""
    four = uniform_plan(parse_formats(check.sizes.four_bits), subject.info, subject.geometry)
    keys, values = check.sizes.mixed

    def tensor(layer: int, names: tuple[str, ...], which: str) -> TensorPlan:
        shape = subject.geometry.layers[layer]
        head_dim = shape.key_head_dim if which == "key" else shape.value_head_dim
        return TensorPlan(**format_named(names[layer % len(names)], which, head_dim).model_dump())

    layers = tuple(
        LayerPlan(layer=entry.layer, key=tensor(entry.layer, keys, "key"), value=tensor(entry.layer, values, "value"))
        for entry in four.layers
    )
    mixed = four.model_copy(update={"layers": layers, "budget": None})
    return {"4 bits": four, "mixed": mixed}


def table(results: dict[str, Any]) -> str:
    """Return all rows as Markdown."""
    lines = [f"{results['device']['name']}, torch {results['torch']}, transformers {results['transformers']}"]
    for name, part in results["parts"].items():
        lines += ["", f"### {name}, {part['seconds']:.0f} s", ""]
        heads = list(dict.fromkeys(word for row in part["rows"] for word in row))
        if heads:
            lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        lines += [f"| {' | '.join(_short(row.get(head, '')) for head in heads)} |" for row in part["rows"]]
        lines += [f"ended in {part['error']}"] if "error" in part else []
    return "\n".join(lines)


def _milliseconds(run: AttentionRun) -> float | str | None:
    return run.reason if run.timing is None else 1e3 * run.timing.median_seconds


def _decoding(run: DecodeRun) -> dict[str, Any]:
    if run.timing is None:
        return {"not": run.reason}
    return {"ms": 1e3 * run.timing.median_seconds, "tokens a second": run.tokens_per_second, "peak": run.peak_bytes}


def _short(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, results: dict[str, Any]) -> None:
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(whole, path)


if __name__ == "__main__":
    sys.exit(main())
