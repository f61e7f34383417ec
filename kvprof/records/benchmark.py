"""Benchmark: how fast a plan's cache decodes on one device, beside 16 bits. Read, written, validated.

Made by `benchmark`, read by people and by the picture. Holds times, bytes and their ratios; every time is a median.
Knows no tensor, and not how anything was timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from kvprof.records.document import Count, Document, ModelInfo, Number, Positive, Record, Text
from kvprof.records.geometry import CacheGeometry, DType, check_same_model

CacheName = Literal["PlanCache", "DynamicCache"]
"""PlanCache: as the plan says. DynamicCache: transformers' own, everything in the model's dtype."""

CACHES: tuple[CacheName, CacheName] = ("PlanCache", "DynamicCache")

Amount = Annotated[Number, Field(ge=0)]
Ratio = Annotated[Number, Field(gt=0)]

ROUNDING = 1e-6
"""Relative; what two ways of dividing the same numbers may differ by."""


class Timing(Record):
    """How long one thing took, of several times that it was done."""

    median_seconds: Amount
    fast_seconds: Amount
    """What a tenth of the times stay below."""
    slow_seconds: Amount
    """What nine tenths stay below."""
    repeats: Positive

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if not self.fast_seconds <= self.median_seconds <= self.slow_seconds:
            raise ValueError(
                f"a median of {self.median_seconds} s does not lie between {self.fast_seconds} and {self.slow_seconds}"
            )
        return self


class DeviceInfo(Record):
    """What everything ran on."""

    type: Text
    """`cuda`, `cpu`, as torch has it."""
    name: Text
    memory_bytes: Positive | None = None
    cache_bytes: Positive
    """Of the L2 of a GPU, of the last cache of a CPU: what the rotating buffers must exceed."""
    threads: Positive | None = None
    """Of a CPU, those that torch uses."""
    compute_capability: Text | None = None


class CopyBandwidth(Record):
    """A copy within the device's memory: what no read of a cache can be expected to exceed."""

    bytes_per_second: Ratio
    """Bytes read and bytes written."""
    buffer_bytes: Positive
    """Of what was copied."""
    timing: Timing


class AttentionRun(Record):
    """The attention of one decoding step, of every planned layer together; or why it was not timed."""

    name: Text
    dtype: DType
    """Of the query; for 16-bit caches, of keys and values too."""
    bytes: Count
    """Keys and values that the step reads, in the form that they are held in."""
    timing: Timing | None = None
    bytes_per_second: Ratio | None = None
    copy_fraction: Ratio | None = None
    """bytes_per_second over that of the copy."""
    buffer_bytes: Positive | None = None
    """The least that a layer's rotating buffers had together."""
    unpacked: Text | None = None
    """Of how many layers the fused kernels do not read the codes in place, and why; null where there are none."""
    reason: Text | None = None
    """Why there is no time."""

    @model_validator(mode="after")
    def _has_a_time_or_a_reason(self) -> Self:
        if (self.timing is None) == (self.reason is None):
            raise ValueError(f"{self.name} needs either a timing or the reason why it has none")
        return self


class AppendRun(Record):
    """Adding one token to every planned layer: packing and all."""

    seconds: Amount
    """The mean, since a whole group is packed only once in many tokens."""
    tokens: Positive
    """Over which the mean is: a group of tokens at least."""
    share: Annotated[Number, Field(ge=0, le=1)]
    """Of a decoding step of the whole model where that was timed, else of attention and append together."""


class DecodeRun(Record):
    """Decoding steps of the whole model with one cache; or why there were none."""

    cache: CacheName
    batch: Positive
    cache_bytes: Count
    """By count, at the context."""
    timing: Timing | None = None
    """Of a step, one token for each sequence."""
    tokens_per_second: Ratio | None = None
    peak_bytes: Count | None = None
    """On a GPU, the most that was allocated, weights and all. On a CPU, by how much the process grew with the cache and
    the steps, its weights apart. Null on another device."""
    reason: Text | None = None

    @model_validator(mode="after")
    def _has_a_time_or_a_reason(self) -> Self:
        if (self.timing is None) == (self.reason is None):
            raise ValueError(f"{self.cache} needs either a timing or the reason why it has none")
        return self


class BenchmarkCase(Record):
    """One context and batch, each with baselines of its own."""

    context: Positive
    """Tokens of every sequence that are in the cache before the step."""
    batch: Positive
    ceiling: Ratio
    """Bytes at 16 bits over the plan's, what is in full precision counted at 2 bytes on both sides: window and all, so
    it lies below 16 / stored bits, and comes near it in a long context."""
    planned: AttentionRun
    full: tuple[AttentionRun, ...]
    """Attention over caches in full precision: each way that there is."""
    speedup: Ratio | None = None
    """How many times faster the plan's attention is than the fastest of `full`; null where one of them has no time."""
    append: AppendRun | None = None
    decode: tuple[DecodeRun, ...] = ()

    @model_validator(mode="after")
    def _speedup_is_the_ratio(self) -> Self:
        _check_ratio("speedup", self.speedup, attention_speedup(self.planned, self.full))
        return self

    @property
    def best_full(self) -> AttentionRun | None:
        """The fastest attention over a cache in full precision."""
        return fastest(self.full)

    def decoding(self, cache: CacheName) -> DecodeRun | None:
        """Return the whole model's steps with one cache, where they were asked for."""
        return next((run for run in self.decode if run.cache == cache), None)


class FittedCache(Record):
    """The largest batch that one cache has room for."""

    cache: CacheName
    batch: Count
    """Sequences that fit, by count; lowered where the device said otherwise."""
    cache_bytes: Count
    """Of so many sequences."""
    working_bytes: Count
    """Set aside for what a step holds besides weights and cache."""
    run: DecodeRun | None = None
    """The whole model at that batch; null where none fits."""
    lowered_from: Positive | None = None
    """What fitted by count, where less did on the device."""


class LargestBatch(Record):
    """How many sequences a given memory has room for in each cache, and how fast they go."""

    memory_bytes: Positive
    """For weights, cache and working memory."""
    context: Positive
    weight_bytes: Count
    planned: FittedCache
    full: FittedCache
    batch_ratio: Amount | None = None
    """How many times more sequences the plan's cache has room for; null where full precision has room for none."""
    throughput_ratio: Ratio | None = None
    """How many times more tokens a second that is; null where one was not measured."""

    @model_validator(mode="after")
    def _ratios_are_the_ratios(self) -> Self:
        batches, rates = fitted_ratios(self.planned, self.full)
        _check_ratio("batch_ratio", self.batch_ratio, batches)
        _check_ratio("throughput_ratio", self.throughput_ratio, rates)
        return self


class BenchmarkedPlan(Record):
    """Which plan it was."""

    name: Text
    digest: Text
    """sha256 of its file."""
    nominal_bits: Ratio
    stored_bits: Ratio
    ceiling: Ratio
    """16 / stored_bits: how many times fewer bytes a long context takes."""

    @model_validator(mode="after")
    def _is_the_ratio(self) -> Self:
        if not math.isclose(self.ceiling, 16 / self.stored_bits, rel_tol=ROUNDING):
            raise ValueError(f"ceiling is {self.ceiling}, but 16 / {self.stored_bits} is {16 / self.stored_bits:.6g}")
        return self


class Benchmark(Document):
    """A file of times: of one plan on one device."""

    kind: ClassVar[str] = "kvprof.benchmark/1"

    schema_: Literal["kvprof.benchmark/1"] = Field("kvprof.benchmark/1", alias="schema")
    kvprof_version: Text | None = None
    model: ModelInfo
    dtype: DType
    """What the model, its queries and its windows are in."""
    random_weights: bool
    """Whether only the model's shape is real."""
    device: DeviceInfo
    versions: dict[Text, Text]
    """Of Python, of libraries and of drivers."""
    kernels: Text
    """`triton`: fused kernels read the codes. `torch`: they are restored first."""
    plan: BenchmarkedPlan
    planned_layers: Positive
    """Those whose attention is timed; each distinct pair of formats once, times its number."""
    skipped_layers: Count
    """Those that the plan leaves alone: the same in every cache, and left out of attention times and bytes."""
    copy_bandwidth: CopyBandwidth
    cases: tuple[BenchmarkCase, ...]
    largest_batch: LargestBatch | None = None
    remarks: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _every_case_stands_once(self) -> Self:
        seen: set[tuple[int, int]] = set()
        for case in self.cases:
            if (case.context, case.batch) in seen:
                raise ValueError(f"the case of {case.context} tokens x {case.batch} stands twice; keep one")
            seen.add((case.context, case.batch))
        return self

    def check_fits(self, geometry: CacheGeometry, fingerprint: str | None = None) -> None:
        """Raise Mismatch, saying how they differ, when the benchmark is of another model than this one."""
        check_same_model("benchmark", self.model, None, geometry, fingerprint)


def fastest(runs: Iterable[AttentionRun]) -> AttentionRun | None:
    """Return the run with the least median time, of those that have one."""
    timed = [(run.timing.median_seconds, index, run) for index, run in enumerate(runs) if run.timing is not None]
    return min(timed)[2] if timed else None


def attention_speedup(planned: AttentionRun, full: Iterable[AttentionRun]) -> float | None:
    """Return how many times faster a plan's attention is than the fastest of the others; None without both times.

    Times of zero, which a coarse clock may give, make no ratio.
    """
    best = fastest(full)
    if best is None or best.timing is None or planned.timing is None:
        return None
    mine, theirs = planned.timing.median_seconds, best.timing.median_seconds
    return theirs / mine if mine and theirs else None


def fitted_ratios(planned: FittedCache, full: FittedCache) -> tuple[float | None, float | None]:
    """Return how many times more sequences, and tokens a second, the plan's cache has; None where one is missing."""
    rates = [fitted.run.tokens_per_second if fitted.run else None for fitted in (planned, full)]
    return (
        planned.batch / full.batch if full.batch else None,
        rates[0] / rates[1] if rates[0] and rates[1] else None,
    )


def _check_ratio(name: str, told: float | None, found: float | None) -> None:
    if (told is None) != (found is None) or (told and found and not math.isclose(told, found, rel_tol=ROUNDING)):
        raise ValueError(f"{name} is {told}, but the numbers beside it make it {found}")
