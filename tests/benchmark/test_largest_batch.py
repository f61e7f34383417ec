"""The largest batch: the one that fits and not one more, fewer where the device says so, none where none fits."""

from __future__ import annotations

import pytest

from kvprof.benchmark.largest_batch import Memory, fit, working_bytes
from kvprof.errors import OutOfMemory
from kvprof.records.benchmark import DecodeRun, Timing

TIMING = Timing(median_seconds=0.5, fast_seconds=0.4, slow_seconds=0.6, repeats=3)


def timed(batch: int) -> DecodeRun:
    return DecodeRun(cache="PlanCache", batch=batch, cache_bytes=batch, timing=TIMING, tokens_per_second=2.0 * batch)


@pytest.mark.parametrize("memory", [1000, 1001, 5000, 12_345, 999_999])
@pytest.mark.parametrize("working", [0, 7, 100])
def test_one_sequence_more_would_not_fit(memory: int, working: int) -> None:
    found = fit("PlanCache", lambda batch: 90 * batch, working, Memory(memory, 700, 10**9), timed)
    brute = max(batch for batch in range(20_000) if 700 + batch * (90 + working) <= memory)
    assert found.batch == brute
    assert found.working_bytes == working * brute
    assert found.lowered_from is None
    assert found.run == timed(brute)


def test_fewer_are_tried_where_the_device_has_no_room() -> None:
    tried: list[int] = []

    def run(batch: int) -> DecodeRun:
        tried.append(batch)
        if batch > 80:
            raise OutOfMemory("no")
        return timed(batch)

    found = fit("PlanCache", lambda batch: batch, 0, Memory(100, 0, 10**9), run)
    assert tried[0] == 100
    assert tried == sorted(tried, reverse=True)
    assert found.batch == tried[-1] <= 80
    assert found.lowered_from == 100


def test_trying_ends() -> None:
    def never(batch: int) -> DecodeRun:
        raise OutOfMemory("no")

    found = fit("PlanCache", lambda batch: batch, 0, Memory(10**6, 0, 10**9), never)
    assert "after 8 tries" in found.run.reason
    assert fit("PlanCache", lambda batch: batch, 0, Memory(2, 0, 10**9), never).batch == 0


def test_weights_that_do_not_fit_leave_room_for_none() -> None:
    found = fit("PlanCache", lambda batch: batch, 0, Memory(100, 101, 10**9), timed)
    assert (found.batch, found.run) == (0, None)


def test_what_the_machine_has_no_room_for_is_counted_but_not_run() -> None:
    found = fit("PlanCache", lambda batch: 90 * batch, 10, Memory(10_000, 0, 9_000), timed)
    assert found.batch == 100
    assert "are needed" in found.run.reason
    assert fit("PlanCache", lambda batch: batch, 0, Memory(9, 0, 9), "no model").run.reason == "no model"


def test_working_memory_is_what_was_measured_and_a_tenth() -> None:
    measured = timed(4).model_copy(update={"cache_bytes": 4000, "peak_bytes": 100_000 + 4000 + 4 * 50_000})
    assert working_bytes(10, 77, measured, weight_bytes=100_000) == 55_000
    assert working_bytes(10, 77, None, weight_bytes=100_000) == 80 + 77
    assert working_bytes(10, 77, timed(4), weight_bytes=100_000) == 80 + 77
