"""The largest batch that fits a memory, in the plan's cache and in full precision, and how fast each goes there.

Reads bytes and what was measured at smaller batches; asks for runs of the whole model, at fewer sequences where the
device says that so many do not fit. Does not know plans, nor how a run is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvprof.benchmark.hardware import room
from kvprof.errors import OutOfMemory
from kvprof.records.benchmark import CacheName, DecodeRun, FittedCache

TRIES = 8
"""How often a batch is lowered before it is given up."""
LOWERED = 0.93
"""What is left of a batch that the device had no room for."""


@dataclass(frozen=True)
class Memory:
    """A memory, the weights that it must hold, and what the machine itself has free beside them."""

    memory_bytes: int
    weight_bytes: int
    free_bytes: int


def working_bytes(vocabulary: int, layer_bytes: int, measured: DecodeRun | None, weight_bytes: int) -> int:
    """Return what a decoding step holds for each sequence besides weights and cache.

    As it was measured, and a tenth more; else logits in two dtypes, and one layer's keys and values in full precision,
    which a cache makes anew in each step. layer_bytes: of these, of one sequence.
    """
    estimated = 8 * vocabulary + layer_bytes
    if measured is None or measured.peak_bytes is None:
        return estimated
    spent = (measured.peak_bytes - weight_bytes - measured.cache_bytes) / measured.batch
    return max(8 * vocabulary, round(1.1 * spent))


def fit(
    name: CacheName,
    cache_bytes: Callable[[int], int],
    working: int,
    memory: Memory,
    run: Callable[[int], DecodeRun] | str,
) -> FittedCache:
    """Return how many sequences fit beside the weights, and a run of so many.

    cache_bytes: of a batch. working: bytes for each sequence, as `working_bytes` has it. run: times a batch, raises
    OutOfMemory; or the reason why there is no model to time.
    """
    each = cache_bytes(1) + working
    by_count = batch = max(0, (memory.memory_bytes - memory.weight_bytes) // each)
    found: DecodeRun | None = None
    for _ in range(TRIES):
        if batch == 0:
            break
        needed = batch * each
        if isinstance(run, str):
            found = DecodeRun(cache=name, batch=batch, cache_bytes=cache_bytes(batch), reason=run)
            break
        if needed > memory.free_bytes:
            reason = f"besides the weights, {room(needed, memory.free_bytes)}"
            found = DecodeRun(cache=name, batch=batch, cache_bytes=cache_bytes(batch), reason=reason)
            break
        try:
            found = run(batch)
        except OutOfMemory:
            batch = min(batch - 1, int(LOWERED * batch))
            continue
        break
    else:
        reason = f"the device had no room for it, after {TRIES} tries with fewer"
        found = DecodeRun(cache=name, batch=max(1, batch), cache_bytes=cache_bytes(max(1, batch)), reason=reason)
    return FittedCache(
        cache=name,
        batch=batch,
        cache_bytes=cache_bytes(batch),
        working_bytes=batch * working,
        run=found,
        lowered_from=by_count if batch < by_count else None,
    )
