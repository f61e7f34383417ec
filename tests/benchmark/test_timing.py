"""Are calls timed as they should be: warmed up, in turns, in the median? By a clock that the tests move."""

from __future__ import annotations

import contextlib

import pytest
import torch

from kvprof.benchmark import timing
from kvprof.records.benchmark import Timing

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still but for what a call moves it by."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", found)
    return found


def test_the_median_is_of_calls_after_the_warm_up(clock: Clock) -> None:
    durations = iter([100.0] * timing.WARM_UP + [1.0, 2.0, 9.0, 3.0, 4.0])

    def call() -> None:
        clock.now += next(durations)

    found = timing.time_calls([call], CPU, 5)
    assert found.median_seconds == 3.0
    assert found.repeats == 5
    assert 1.0 <= found.fast_seconds < 2.0
    assert 4.0 < found.slow_seconds <= 9.0
    assert next(durations, None) is None


def test_buffers_are_taken_in_turns() -> None:
    seen: list[int] = []
    timing.time_calls([lambda number=number: seen.append(number) for number in range(3)], CPU, 6)
    assert seen == [number % 3 for number in range(timing.WARM_UP + 6)]


@pytest.mark.parametrize(("held", "cache"), [(1000, 10_000), (1, 200), (50_000, 10_000), (20_000, 10_000), (7, 333)])
def test_all_sets_together_exceed_twice_the_cache_and_one_fewer_does_not(held: int, cache: int) -> None:
    sets = timing.sets_needed(held, cache)
    assert sets * held > 2 * cache
    assert (sets - 1) * held <= 2 * cache


def test_sets_of_next_to_nothing_are_not_without_number() -> None:
    assert timing.sets_needed(1, 10**9) == timing.sets_needed(0, 10**9) == timing.MOST_SETS


def test_times_of_several_things_add_up_as_often_as_each_is_done() -> None:
    one = Timing(median_seconds=2.0, fast_seconds=1.0, slow_seconds=4.0, repeats=9)
    other = Timing(median_seconds=10.0, fast_seconds=10.0, slow_seconds=20.0, repeats=5)
    assert timing.added([(3, one), (1, other)]) == Timing(
        median_seconds=16.0, fast_seconds=13.0, slow_seconds=32.0, repeats=5
    )


def test_a_copy_counts_what_it_reads_and_what_it_writes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = torch.Tensor.copy_

    def slow_copy(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        clock.now += 0.5
        return copy(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", slow_copy)
    monkeypatch.setattr(timing, "LEAST_COPIED", 1000)
    found = timing.copy_bandwidth(CPU, cache_bytes=1000, free_bytes=10**6, repeats=4)
    assert found.buffer_bytes == 8000
    assert found.bytes_per_second == 2 * 8000 / 0.5


def test_a_copy_leaves_room_on_a_small_machine() -> None:
    assert timing.copy_bandwidth(CPU, cache_bytes=10**9, free_bytes=80_000, repeats=1).buffer_bytes == 10_000


class FakeGpu:
    """A GPU whose time a call moves, behind a host that needs some of its own to hand the call over."""

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.spun = 0.0, []
        self.clock = clock
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "_sleep", self.spun.append)

    def call(self, seconds: float, host_seconds: float = 0.001) -> None:
        self.now += seconds
        self.clock.now += host_seconds


@pytest.mark.parametrize("hides_host", [True, False])
def test_on_a_gpu_events_tell_the_time_and_the_host_gets_a_head_start(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, hides_host: bool
) -> None:
    gpu = FakeGpu(clock, monkeypatch)
    found = timing.time_calls([lambda: gpu.call(2.0), lambda: gpu.call(4.0)], torch.device("cuda"), 8, hides_host)
    assert (found.median_seconds, found.fast_seconds, found.slow_seconds) == pytest.approx((3.0, 2.0, 4.0))
    head_start = [cycles / timing.SPIN_HZ for cycles in gpu.spun]
    assert head_start == ([pytest.approx(2 * 8 * 0.001)] if hides_host else [])


def test_a_slow_host_does_not_hold_the_gpu_for_long(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(clock, monkeypatch)
    timing.time_calls([lambda: gpu.call(1.0, host_seconds=100.0)], torch.device("cuda"), 8)
    assert gpu.spun == [int(timing.SPIN_HZ * timing.LONGEST_SPIN_SECONDS)]
