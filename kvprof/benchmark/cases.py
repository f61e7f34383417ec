"""One context and batch of a benchmark: attention, appending, and decoding steps of the whole model.

Reads a subject and its plan; returns records, a reason in the place of each number that this machine has no room for.
Does not know the file that they go to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from kvprof.benchmark.bench import Bench
from kvprof.benchmark.decode import DecodeSettings, lacks_positions, time_decode, why_not
from kvprof.benchmark.full_attention import full_bytes, time_full
from kvprof.benchmark.hardware import room
from kvprof.benchmark.largest_batch import Memory, fit, working_bytes
from kvprof.benchmark.planned_attention import AppendCost, attention_bytes, planned_bytes, time_planned, untimed
from kvprof.benchmark.subject import Subject
from kvprof.errors import KvprofError, OutOfMemory
from kvprof.models.config import weight_bytes
from kvprof.models.memory import free_bytes, memory_explained
from kvprof.records.benchmark import (
    CACHES,
    AppendRun,
    AttentionRun,
    BenchmarkCase,
    CacheName,
    DecodeRun,
    LargestBatch,
    attention_speedup,
    fitted_ratios,
)
from kvprof.records.geometry import CacheGeometry, DType, bytes_text
from kvprof.records.plan import BitPlan
from kvprof.runtime import PlanCache

SPARE = 0.9
"""Of the free memory, what a case may take."""


@dataclass(frozen=True)
class Cases:
    """Measures cases of one plan on one model.

    plan: with the model's geometry in the dtype that everything is in. steps: of the whole model, None where it is left
    out. tick: called after each part of a case.
    """

    subject: Subject
    plan: BitPlan
    bench: Bench
    steps: int | None
    tick: Callable[[], None]

    def measure(self, context: int, batch: int) -> BenchmarkCase:
        """Return one case; what does not fit this machine has a reason instead of a time."""
        narrow = self._with_dtype("float16")
        with torch.inference_mode():  # as whoever generates text
            planned, full, cost = self._attention(context, batch)
        decode = () if self.steps is None else tuple(self._decode(name, context, batch) for name in CACHES)
        return BenchmarkCase(
            context=context,
            batch=batch,
            ceiling=full_bytes(narrow, context, batch, 2) / planned_bytes(narrow, context, batch),
            planned=planned,
            full=full,
            speedup=attention_speedup(planned, full),
            append=None if cost is None else _append(cost, planned, decode),
            decode=decode,
        )

    def largest_batch(self, memory_bytes: int, context: int, cases: list[BenchmarkCase]) -> LargestBatch:
        """Return how many sequences of a context a memory has room for in each cache, and how fast they go.

        cases: measured before; the working memory is taken from them where a GPU told it.
        """
        weights = self._weight_bytes
        model = self._model if self.steps is not None else "the whole model was left out, by --attention-only"
        on_gpu = self.bench.device.type == "cuda"
        free = int(SPARE * free_bytes(self.bench.device))
        if on_gpu:  # which says itself what it has no room for
            free = torch.cuda.get_device_properties(self.bench.device).total_memory - weights
        given = Memory(memory_bytes, weights, free)
        fitted = []
        for name in CACHES:

            def run(batch: int, name: CacheName = name) -> DecodeRun:
                found = self._decode_at(name, context, batch)
                if on_gpu and found.peak_bytes is not None and found.peak_bytes > memory_bytes:
                    raise OutOfMemory(f"{batch} sequences took {bytes_text(found.peak_bytes)}.")
                return found

            before = [case.decoding(name) for case in cases if case.context == context] if on_gpu else []
            measured = max((found for found in before if found and found.timing), key=_batch, default=None)
            working = self._working(context, measured)
            count = self._counter(name, self._settings(context, 1).tokens_held)
            fitted.append(fit(name, count, working, given, model if isinstance(model, str) else run))
            self.tick()
        planned, full = fitted
        batches, rates = fitted_ratios(planned, full)
        return LargestBatch(
            memory_bytes=memory_bytes,
            context=context,
            weight_bytes=weights,
            planned=planned,
            full=full,
            batch_ratio=batches,
            throughput_ratio=rates,
        )

    def _attention(self, context: int, batch: int) -> tuple[AttentionRun, tuple[AttentionRun, ...], AppendCost | None]:
        needed = attention_bytes(self.plan, context, batch, self.bench)
        free = int(SPARE * free_bytes(self.bench.device))
        reason, cost = None, None
        if needed > free:
            reason = room(needed, free)
        else:
            try:
                with memory_explained("out of memory on the device"):
                    planned, cost = time_planned(self.plan, context, batch, self.bench)
            except OutOfMemory as error:
                reason = str(error)
        if reason is not None:
            planned = untimed(self.plan, context, batch, self.bench, reason)
        self.tick()
        full = () if needed > free else time_full(self.plan, context, batch, self.bench)
        self.tick()
        return planned, full, cost

    def _decode(self, name: CacheName, context: int, batch: int) -> DecodeRun:
        held = self._counter(name, context)(batch)
        needed = self._counter(name, self._settings(context, batch).tokens_held)(batch)
        needed += batch * self._working(context)
        reason = None
        if isinstance(self._model, str):
            reason = self._model
        elif needed > (free := int(SPARE * free_bytes(self.bench.device))):
            reason = f"besides the weights, {room(needed, free)}"
        elif lacks_positions(self._model, self._settings(context, batch).tokens_held):
            reason = "the model has no positions beyond those that it was made for"
        try:
            if reason is None:
                return self._decode_at(name, context, batch)
        except OutOfMemory:
            reason = "out of memory on the device"
        finally:
            self.tick()
        return DecodeRun(cache=name, batch=batch, cache_bytes=held, reason=reason)

    def _decode_at(self, name: CacheName, context: int, batch: int) -> DecodeRun:
        model = self._model
        assert not isinstance(model, str)
        make = self._planned_cache if name == "PlanCache" else lambda: DynamicCache(config=model.config)
        held = self._counter(name, context)(batch)
        own = model.config._attn_implementation
        try:
            return time_decode(model, name, make, held, self._settings(context, batch))
        except KvprofError:
            raise
        except Exception as error:  # models of every architecture, without the prompt that their code may count on
            return DecodeRun(cache=name, batch=batch, cache_bytes=held, reason=why_not(error))
        finally:  # with fused kernels a model attends through kvprof, which no other cache shall pay for
            if model.config._attn_implementation != own:
                model.set_attn_implementation(own)

    def _planned_cache(self) -> Cache:
        assert not isinstance(self._model, str)
        plan = self.plan.model_copy(update={"model": self.plan.model.model_copy(update={"fingerprint": None})})
        return PlanCache.from_plan(plan, self._model, self.bench.kernels.name)  # the fingerprint was compared before

    def _counter(self, name: CacheName, context: int) -> Callable[[int], int]:
        """Return what counts the bytes of a cache at a context, by its batch."""
        counted = self.plan.bytes_at if name == "PlanCache" else self._geometry.bytes_at
        return lambda batch: counted(context, batch)

    def _settings(self, context: int, batch: int) -> DecodeSettings:
        return DecodeSettings(context, batch, self.steps or 1, self.bench.seed)

    def _working(self, context: int, measured: DecodeRun | None = None) -> int:
        layer = max(map(self._geometry.bytes_per_token, self._geometry.layers)) * context
        return working_bytes(self.subject.text_config.vocab_size, layer, measured, self._weight_bytes)

    def _with_dtype(self, dtype: DType) -> BitPlan:
        return self.plan.model_copy(update={"geometry": self._geometry.model_copy(update={"dtype": dtype})})

    @property
    def _geometry(self) -> CacheGeometry:
        assert self.plan.geometry is not None
        return self.plan.geometry

    @cached_property
    def _weight_bytes(self) -> int:
        return weight_bytes(self.subject.config, self._geometry.dtype)

    @cached_property
    def _model(self) -> PreTrainedModel | str:
        """The model, loaded when it is first asked for; or why there is no room for it."""
        free = int(SPARE * free_bytes(self.bench.device))
        if self._weight_bytes > free:
            return f"for its weights, {room(self._weight_bytes, free)}"
        return self.subject.make(self._geometry.dtype, self.bench.device)


def _append(cost: AppendCost, planned: AttentionRun, decode: tuple[DecodeRun, ...]) -> AppendRun:
    step = next((run.timing.median_seconds for run in decode if run.cache == "PlanCache" and run.timing), None)
    if step is None:
        assert planned.timing is not None
        step = planned.timing.median_seconds + cost.seconds
    return AppendRun(seconds=cost.seconds, tokens=cost.tokens, share=min(1.0, cost.seconds / max(step, 1e-12)))


def _batch(run: DecodeRun) -> int:
    return run.batch
