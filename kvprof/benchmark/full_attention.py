"""Decode attention over caches in full precision: every way that this machine has, and why it lacks the others.

Reads which layers a plan covers, their shapes alone; returns records of times and bytes. Does not know formats.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvprof.benchmark.bench import Bench, run_maker
from kvprof.benchmark.hardware import room
from kvprof.benchmark.timing import added, sets_needed, time_calls
from kvprof.errors import first_line
from kvprof.models.memory import free_bytes
from kvprof.records.benchmark import AttentionRun
from kvprof.records.geometry import KVLayer
from kvprof.records.plan import BitPlan

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

_GPU_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
}
_CPU_BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA math": SDPBackend.MATH}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a query (B, query heads, 1, D), keys and values (B, H, T, D)."""


class CannotRun(Exception):
    """Why a way of attending does not run here."""


@dataclass(frozen=True)
class Way:
    """One way to attend to keys and values of one dtype."""

    name: str
    dtype: torch.dtype
    attend: Attention
    repeats_heads: bool = False
    """Whether it makes copies of keys and values for every query head that reads them."""

    def call(self, query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], object]:
        """Return what attends once, known to run; raises CannotRun, saying why it does not."""
        query, keys, values = (x.to(self.dtype) for x in (query, keys, values))
        with _reasons():
            self.attend(query, keys, values)
        return functools.partial(self.attend, query, keys, values)


def ways_to_attend(device: torch.device, dtype: torch.dtype) -> list[Way]:
    """Return each way to attend in 16 bits that a device may have; of a wider dtype, what there is in that one too."""
    narrow = dtype if dtype in SIXTEEN_BITS else torch.bfloat16
    backends = _GPU_BACKENDS if device.type == "cuda" else _CPU_BACKENDS if device.type == "cpu" else {}
    ways = []
    for chosen in dict.fromkeys((narrow, dtype)):
        ways.append(Way("SDPA", chosen, _sdpa))
        ways += [
            Way(name, chosen, functools.partial(_backend, backend), repeats_heads=backend == SDPBackend.MATH)
            for name, backend in backends.items()
        ]
    if device.type == "cuda":
        ways += [Way("FlashAttention", narrow, _flash_package), Way("FlexAttention", narrow, _flex)]
    return ways


def full_bytes(plan: BitPlan, context: int, batch: int, element_bytes: int) -> int:
    """Return the bytes of the same layers with nothing quantized."""
    return batch * context * element_bytes * sum(shape.key_width + shape.value_width for shape in _planned_shapes(plan))


def time_full(plan: BitPlan, context: int, batch: int, bench: Bench) -> tuple[AttentionRun, ...]:
    """Return the time of a step's attention to the same layers in full precision, each way that there is."""
    shapes = Counter((shape.kv_heads, shape.key_head_dim, shape.value_head_dim) for shape in _planned_shapes(plan))
    return tuple(
        _time_way(way, shapes, plan, context, batch, bench) for way in ways_to_attend(bench.device, bench.dtype)
    )


def _time_way(
    way: Way, shapes: Counter[tuple[int, int, int]], plan: BitPlan, context: int, batch: int, bench: Bench
) -> AttentionRun:
    run = run_maker(way.name, way.dtype, full_bytes(plan, context, batch, way.dtype.itemsize), bench)
    parts, buffers = [], []
    if way.repeats_heads:
        widest = max(key_dim + value_dim for _, key_dim, value_dim in shapes)
        needed = 2 * batch * (context + 1) * bench.query_heads * widest * max(4, way.dtype.itemsize)
        free = free_bytes(bench.device)
        if needed > free:
            return run(f"it repeats keys and values for every query head: {room(needed, free)}")
    try:
        for (heads, key_dim, value_dim), times in shapes.items():
            held = batch * heads * context * (key_dim + value_dim) * way.dtype.itemsize
            sets = sets_needed(held, bench.cache_bytes)
            query, keys, values = (
                bench.random(batch, number, tokens, head_dim).to(way.dtype)
                for number, tokens, head_dim in (
                    (bench.query_heads, 1, key_dim),
                    (heads, context + 1, key_dim),
                    (heads, context + 1, value_dim),
                )
            )
            calls = [way.call(query, keys, values)]  # raises where it cannot run, before there are copies
            calls += [_like(way, query, keys, values) for _ in range(sets - 1)]
            parts.append((times, time_calls(calls, bench.device, bench.repeats)))
            buffers.append(sets * held)
            del calls
    except CannotRun as error:
        return run(str(error))
    except torch.OutOfMemoryError:
        return run("out of memory on the device")
    return run(added(parts), min(buffers))


def _like(way: Way, query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], object]:
    query, keys, values = query.clone(), keys.clone(), values.clone()
    return lambda: way.attend(query, keys, values)


def _planned_shapes(plan: BitPlan) -> list[KVLayer]:
    assert plan.geometry is not None
    return [plan.geometry.layers[entry.layer] for entry in plan.layers]


def _sdpa(query_BHqD: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        query_BHqD, keys_BHTD, values_BHTD, enable_gqa=query_BHqD.shape[1] != keys_BHTD.shape[1]
    )


def _backend(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(query, keys, values)


def _flash_package(query_BHqD: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor) -> Tensor:
    """Attend by the package flash-attn, whose kernel for decoding splits the tokens; it wants tokens before heads."""
    return _flash_kernel()(query_BHqD.transpose(1, 2), keys_BHTD.transpose(1, 2), values_BHTD.transpose(1, 2))


def _flex(query_BHqD: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor) -> Tensor:
    """Attend by torch's FlexAttention, compiled, as it is meant to be used."""
    return _flex_kernel()(query_BHqD, keys_BHTD, values_BHTD, enable_gqa=query_BHqD.shape[1] != keys_BHTD.shape[1])


@functools.cache
def _flex_kernel() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention  # loads the compiler, which nothing else here needs

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _flash_kernel() -> Attention:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:  # it is not there, or was built for another torch
        missing = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
        raise CannotRun(
            "the package flash-attn is not installed" if missing else f"flash-attn: {first_line(error)}"
        ) from None
    return flash_attn_with_kvcache  # type: ignore[no-any-return]


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever a kernel refuses with into CannotRun; torch says why in warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield
        except (CannotRun, torch.OutOfMemoryError):
            raise
        except Exception as error:  # kernels of torch and of other packages, each with errors of its own
            raise CannotRun(_reason(error, [str(warning.message) for warning in said])) from None


def _reason(error: Exception, said: Sequence[str]) -> str:
    """Return the sentence that says why no kernel runs: of torch's warnings the first that is more than a heading."""
    told = [text.split(" (Triggered internally")[0].strip() for text in said]
    plain = [text for text in told if text and not text.endswith(":") and "not used because" not in text]
    return (plain or [first_line(error)])[0]
