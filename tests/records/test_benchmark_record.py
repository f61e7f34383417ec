"""A Benchmark file says what was timed, and one that contradicts itself is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarked import benchmark, benchmark_json, refused

from kvprof.errors import InvalidFile, Mismatch
from kvprof.records.benchmark import Benchmark, attention_speedup
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.kinds import load_any


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    found = benchmark()
    path = found.save(tmp_path / "b.json")
    assert Benchmark.load(path) == load_any(path) == found


def test_the_best_in_full_precision_is_the_fastest_that_ran() -> None:
    case = benchmark().cases[0]
    assert case.best_full.name == "SDPA flash"
    assert attention_speedup(case.planned, case.full) == pytest.approx(3.0)
    assert case.decoding("DynamicCache").timing.median_seconds == 0.03
    assert attention_speedup(case.planned, case.full[2:]) is None


def change(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change("cases", 0, "speedup", to=9.0), "speedup is 9.0, but the numbers beside it make it 3.0"),
        (change("cases", 0, "speedup", to=None), "speedup is None"),
        (change("plan", "ceiling", to=9.0), "ceiling is 9.0, but 16 / 4.0 is 4"),
        (change("largest_batch", "batch_ratio", to=1.0), "batch_ratio is 1.0"),
        (change("largest_batch", "throughput_ratio", to=None), "throughput_ratio is None"),
        (change("cases", 0, "full", 0, "reason", to="why"), "SDPA needs either a timing or the reason"),
        (change("cases", 0, "decode", 0, "timing", to=None), "PlanCache needs either a timing or the reason"),
        (change("cases", 0, "planned", "timing", "fast_seconds", to=9.0), "does not lie between"),
        (change("cases", 1, "batch", to=1), "the case of 4096 tokens x 1 stands twice"),
        (change("cases", 0, "planned", "dtype", to="int8"), "cases[0].planned.dtype"),
        (change("cases", 0, "planned", "bytes", to=-1), "cases[0].planned.bytes"),
        (change("cases", 0, "append", "share", to=1.5), "cases[0].append.share"),
        (change("fast", to=True), "unknown key fast"),
    ],
)
def test_what_contradicts_itself_is_refused(edit: Callable[[dict[str, Any]], None], words: str) -> None:
    document = benchmark_json()
    edit(document)
    with pytest.raises(InvalidFile) as refusal:
        Benchmark.from_json(document, "b.json")
    assert words in str(refusal.value)


def test_without_times_there_are_no_ratios() -> None:
    document = benchmark_json(contexts=(10,), batches=(1,))
    document["cases"][0] |= {"planned": refused("PlanCache, triton", 7), "speedup": None}
    assert Benchmark.from_json(document, "b.json").cases[0].speedup is None


def test_it_is_of_the_model_with_as_many_layers() -> None:
    shape = KVLayer(layer=0, kind="full", kv_heads=1, key_head_dim=8, value_head_dim=8)
    layers = tuple(shape.model_copy(update={"layer": layer}) for layer in range(32))
    benchmark().check_fits(CacheGeometry(dtype="bfloat16", layers=layers))
    with pytest.raises(Mismatch, match="it has 32 layers, this model 2"):
        benchmark().check_fits(CacheGeometry(dtype="bfloat16", layers=layers[:2]))
