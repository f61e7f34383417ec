"""How long a call takes on a device: warmed up, in the median of several, its data cold.

Times callables, and a copy within the device's memory. On a GPU by events on its stream, elsewhere by the clock. Does
not know what is called.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from kvprof.records.benchmark import CopyBandwidth, Timing

WARM_UP = 3
"""Calls that are not timed: they compile, allocate and choose algorithms."""
MOST_SETS = 1024
"""Buffer sets that rotate at most; so many of a few kilobytes each may fit the cache, and the result then says so."""
COPIED_CACHES = 8
"""The copied buffer is so many times larger than the cache, and at least LEAST_COPIED bytes."""
LEAST_COPIED = 256 * 2**20
SPIN_HZ = 2e9
"""Cycles a second of a waiting GPU, roughly; it must only wait longer than the host needs."""
LONGEST_SPIN_SECONDS = 0.5

Call = Callable[[], object]


def time_calls(calls: Sequence[Call], device: torch.device, repeats: int, hides_host: bool = True) -> Timing:
    """Return how long a call takes, of several that do the same on buffers of their own, taken in turns.

    calls: as many as `sets_needed` says, so that no call finds its data in the cache.
    hides_host: of a GPU, wait until the host has handed over all calls, so that only the device's time counts; without
    it, the time that the host needs between two calls counts where the device waits for it.
    """
    turns = itertools.cycle(calls)
    for _ in range(WARM_UP):
        next(turns)()
    if device.type == "cuda":
        return summarise(_event_seconds(turns, device, repeats, hides_host))
    return summarise(_clock_seconds(turns, device, repeats))


def sets_needed(set_bytes: int, cache_bytes: int) -> int:
    """Return how many buffer sets of so many bytes together exceed twice the cache, MOST_SETS at most."""
    return min(MOST_SETS, 2 * cache_bytes // max(1, set_bytes) + 1)


def summarise(seconds: Sequence[float]) -> Timing:
    """Return median and spread of several times."""
    fast, median, slow = (float(part) for part in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return Timing(median_seconds=median, fast_seconds=fast, slow_seconds=slow, repeats=len(seconds))


def added(timings: Sequence[tuple[int, Timing]]) -> Timing:
    """Return the time of several things one after another, each so many times; spreads add up as if they went along."""
    return Timing(
        median_seconds=math.fsum(times * timing.median_seconds for times, timing in timings),
        fast_seconds=math.fsum(times * timing.fast_seconds for times, timing in timings),
        slow_seconds=math.fsum(times * timing.slow_seconds for times, timing in timings),
        repeats=min(timing.repeats for _, timing in timings),
    )


def copy_bandwidth(device: torch.device, cache_bytes: int, free_bytes: int, repeats: int) -> CopyBandwidth:
    """Return how fast a device copies within its own memory, by a buffer far larger than its cache.

    free_bytes: of the device's memory; of a small one, the buffer and its copy take a quarter at most.
    """
    size = max(1, min(max(COPIED_CACHES * cache_bytes, LEAST_COPIED), free_bytes // 8))
    source = torch.ones(size, dtype=torch.uint8, device=device)  # written once, so that every page is there
    target = torch.zeros_like(source)
    timing = time_calls([lambda: target.copy_(source)], device, repeats)
    rate = 2 * size / max(timing.median_seconds, 1e-9)
    return CopyBandwidth(bytes_per_second=rate, buffer_bytes=size, timing=timing)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _clock_seconds(turns: Iterator[Call], device: torch.device, repeats: int) -> list[float]:
    seconds = []
    synchronise(device)
    for _ in range(repeats):
        call = next(turns)
        start = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def _event_seconds(turns: Iterator[Call], device: torch.device, repeats: int, hides_host: bool) -> list[float]:
    with torch.cuda.device(device):
        event: Any = torch.cuda.Event
        events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
        if hides_host:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(WARM_UP):
                next(turns)()
            host_seconds = (time.perf_counter() - start) / WARM_UP
            torch.cuda.synchronize()
            spin_seconds = min(2 * repeats * host_seconds, LONGEST_SPIN_SECONDS)
            spin: Any = torch.cuda._sleep
            spin(int(SPIN_HZ * spin_seconds))
        for before, after in events:
            call = next(turns)
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in events]
