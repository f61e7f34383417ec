"""The attention of one decoding step through a plan's codes, all planned layers together; and what a new token costs.

Reads a plan with its geometry and a device; returns records of times and bytes. Each distinct pair of formats is timed
once and counts as often as layers have it. Does not know the rest of the model.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvprof.benchmark.bench import FILL_BYTES, Bench, fill_tokens, run_maker
from kvprof.benchmark.timing import added, sets_needed, time_calls
from kvprof.records.benchmark import AttentionRun, Timing
from kvprof.records.formats import TENSORS
from kvprof.records.geometry import KVLayer
from kvprof.records.plan import AnyLayerPlan, BitPlan, TensorPlan, tensor_bytes
from kvprof.runtime.layers import PlannedLayer

GROUPS_APPENDED = 2
"""Groups of tokens that are filled, and packed, while appending is timed."""


@dataclass(frozen=True)
class Kind:
    """A pair of formats on a layer of one shape; an entry and a layer that stand for all like them."""

    entry: AnyLayerPlan
    shape: KVLayer

    @property
    def identity(self) -> tuple[object, ...]:
        """What two layers must share to be timed as one."""
        return (*self.forms, *self.widths, self.shape.window)

    @property
    def forms(self) -> tuple[TensorPlan, TensorPlan]:
        """Of keys and of values."""
        return self.entry.key, self.entry.value

    @property
    def widths(self) -> tuple[int, int, int]:
        """KV heads, and the dimensions of keys and of values."""
        return self.shape.kv_heads, self.shape.key_head_dim, self.shape.value_head_dim


@dataclass(frozen=True)
class AppendCost:
    """What one more token costs all planned layers, on average over so many."""

    seconds: float
    tokens: int


def kinds_of(plan: BitPlan) -> list[tuple[Kind, int]]:
    """Return each kind of planned layer, and how many layers are of it."""
    assert plan.geometry is not None
    kinds = [Kind(entry, plan.geometry.layers[entry.layer]) for entry in plan.layers]
    times = Counter(kind.identity for kind in kinds)
    first: dict[tuple[object, ...], Kind] = {}
    for kind in kinds:
        first.setdefault(kind.identity, kind)
    return [(kind, times[identity]) for identity, kind in first.items()]


def planned_bytes(plan: BitPlan, context: int, batch: int) -> int:
    """Return the bytes of the layers that a plan covers, those that it skips left out."""
    return sum(times * _kind_bytes(kind, plan, context, batch) for kind, times in kinds_of(plan))


def attention_bytes(plan: BitPlan, context: int, batch: int, bench: Bench) -> int:
    """Return what timing needs at most, but for ways that repeat heads.

    One layer's keys and values in full precision a few times over: made, held and read; what rounding a part of them
    takes; and the rotating buffers.
    """
    largest = max(kind.shape.key_width + kind.shape.value_width for kind, _ in kinds_of(plan))
    held = batch * (context + 1) * largest * bench.dtype.itemsize
    return 4 * held + 8 * min(FILL_BYTES, held) + 3 * bench.cache_bytes


def time_planned(plan: BitPlan, context: int, batch: int, bench: Bench) -> tuple[AttentionRun, AppendCost]:
    """Return the time of a step's attention through a plan's codes, and of the step's appending.

    plan: with the geometry of the model in the dtype that is timed.
    """
    parts: list[tuple[int, Timing]] = []
    appended: list[tuple[int, AppendCost]] = []
    buffers = []
    unpacked: Counter[str] = Counter()
    for kind, times in kinds_of(plan):
        layer = _filled(plan, kind, context, batch, bench)
        if reason := _why_unpacked(layer, kind, batch, bench):
            unpacked[reason] += times
        held = _kind_bytes(kind, plan, context, batch)
        sets = sets_needed(held, bench.cache_bytes)
        layers = [layer, *(copy.deepcopy(layer) for _ in range(sets - 1))]
        calls = [_planned_call(one, kind, batch, bench, number) for number, one in enumerate(layers)]
        parts.append((times, time_calls(calls, bench.device, bench.repeats)))
        buffers.append(sets * held)
        del calls, layers
        appended.append((times, _time_append(layer, kind, batch, bench)))
    cost = AppendCost(
        math.fsum(times * cost.seconds for times, cost in appended), min(cost.tokens for _, cost in appended)
    )
    run = _planned_run(plan, context, batch, bench)(added(parts), min(buffers))
    note = "; ".join(f"{times} of {len(plan.layers)} layers: {reason}" for reason, times in unpacked.items())
    return run.model_copy(update={"unpacked": note or None}), cost


def untimed(plan: BitPlan, context: int, batch: int, bench: Bench, reason: str) -> AttentionRun:
    """Return what stands for `time_planned` where that cannot be."""
    return _planned_run(plan, context, batch, bench)(reason)


def _planned_call(layer: PlannedLayer, kind: Kind, batch: int, bench: Bench, number: int) -> Callable[[], object]:
    """Return what attends once to a layer: to what it holds, and to a new token."""
    heads, key_dim, value_dim = kind.widths
    query = bench.random(batch, bench.query_heads, 1, key_dim, number)
    # What adding the token costs is timed by itself.
    history = layer.history(
        bench.random(batch, heads, 1, key_dim, number), bench.random(batch, heads, 1, value_dim, number)
    )

    def attend() -> object:
        return layer.key.kernels.attend(query, history, scaling=key_dim**-0.5, mask=None, softcap=None)

    return attend


def _filled(plan: BitPlan, kind: Kind, context: int, batch: int, bench: Bench) -> PlannedLayer:
    """Return a layer that holds so many random tokens, put in a few at a time so that rounding them stays small."""
    layer = PlannedLayer(plan, kind.entry, kind.shape, bench.kernels)
    heads, key_dim, value_dim = kind.widths
    chunk = fill_tokens(batch * heads * max(key_dim, value_dim), bench.dtype)
    for first in range(0, context, chunk):
        tokens = min(chunk, context - first)
        keys, values = (bench.random(batch, heads, tokens, head_dim, first) for head_dim in (key_dim, value_dim))
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        put(layer, keys, values)
    return layer


def put(layer: PlannedLayer, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
    """Add tokens to a layer that knows its batch, without reading what it holds: that may take more than decoding."""
    for store, new in zip(layer.stores, (keys_BHTD, values_BHTD), strict=True):
        store.append(new)
        store.settle()


def _why_unpacked(layer: PlannedLayer, kind: Kind, batch: int, bench: Bench) -> str | None:
    """Return why the kernels do not attend to a layer's codes as they lie, or None where they do."""
    if layer.key.kernels is not bench.kernels:
        return f"a {kind.shape.window_text} is unpacked at every step"
    heads, key_dim, value_dim = kind.widths
    query = bench.random(batch, bench.query_heads, 1, key_dim)
    history = layer.history(bench.random(batch, heads, 1, key_dim), bench.random(batch, heads, 1, value_dim))
    return bench.kernels.why_not(query, history, None)


def _time_append(layer: PlannedLayer, kind: Kind, batch: int, bench: Bench) -> AppendCost:
    """Return the mean time that a layer takes to hold one more token, over whole groups of tokens; changes the layer.

    What a query reads of it is attention's time, not this.
    """
    group = max([form.group_size for form in kind.forms if form.axis == "channel" and not form.is_full], default=1)
    heads, key_dim, value_dim = kind.widths
    key, value = (bench.random(batch, heads, 1, head_dim) for head_dim in (key_dim, value_dim))

    def append(tokens: int) -> None:
        for _ in range(tokens):
            put(layer, key, value)

    tokens = GROUPS_APPENDED * group * -(-bench.repeats // (GROUPS_APPENDED * group))
    # Whole groups a call, so that each packs as many; on a GPU only what the GPU does counts, as of attention.
    timing = time_calls([lambda: append(group)], bench.device, tokens // group)
    return AppendCost(timing.median_seconds / group, tokens)


def _kind_bytes(kind: Kind, plan: BitPlan, context: int, batch: int) -> int:
    assert plan.geometry is not None
    element_bytes = plan.geometry.element_bytes
    return batch * sum(
        tensor_bytes(form, kind.shape, tensor, plan.window, element_bytes, context, form.recent_fraction)
        for tensor, form in zip(TENSORS, kind.forms, strict=True)
    )


def _planned_run(plan: BitPlan, context: int, batch: int, bench: Bench) -> Callable[..., AttentionRun]:
    return run_maker(f"PlanCache, {bench.kernels.name}", bench.dtype, planned_bytes(plan, context, batch), bench)
