"""The program that checks a GPU, at toy sizes: every part runs.

Times say nothing here; what is held is that each part ends in rows, and that a part that fails costs no other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_device import small_device  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_device")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    import gpu

    return gpu


def test_every_part_ends_in_rows(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # which takes minutes for all of it
    assert gpu.main([str(tmp_path), "--toy", "--skip", "tests"]) == 0
    found = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    parts = found["parts"]
    assert list(parts) == ["attention", "step", "throughput", "gradients"]
    assert [(row["plan"], row["context"], row["batch"]) for row in parts["attention"]["rows"]] == [
        ("4 bits", 200, 1),
        ("mixed", 200, 1),
    ]
    assert all(isinstance(row["planned ms"], float) for row in parts["attention"]["rows"])
    steps = {row["cache"]: row for row in parts["step"]["rows"]}
    assert set(steps) == {"StaticCache", "DynamicCache", "PlanCache, 4 bits", "PlanCache, mixed"}
    assert all(row["tokens a second"] > 0 for row in steps.values())
    assert {row["cache"] for row in parts["throughput"]["rows"]} == {"PlanCache", "DynamicCache"}
    assert parts["gradients"]["rows"][0]["ratio"] > 0
    table = gpu.table(found)
    assert all(f"### {part}" in table for part in parts)


def test_triton_s_kernels_run_a_decoding_step_under_their_interpreter(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "TOY", replace(gpu.TOY, step=(197, 1)))  # a group of 64 keys is packed
    monkeypatch.setattr("kvprof.benchmark.timing.WARM_UP", 1)
    check = gpu.Check(gpu.torch.device("cpu"), gpu.TOY, tmp_path, is_toy=True)
    assert check.kernels == "triton"
    steps = {row["cache"]: row for row in gpu.step(check)}
    assert all(row["tokens a second"] > 0 for row in steps.values())


def test_a_part_that_fails_is_told_and_costs_no_other(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(check: Any) -> Iterator[dict[str, Any]]:
        yield {"cache": "first"}
        raise RuntimeError("out of luck")

    monkeypatch.setitem(gpu.PARTS, "step", broken)
    assert gpu.main([str(tmp_path), "--toy", "--only", "step", "--only", "gradients"]) == 1
    parts = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["parts"]
    assert parts["step"]["rows"] == [{"cache": "first"}]
    assert parts["step"]["error"] == "RuntimeError: out of luck"
    assert parts["gradients"]["rows"]
    assert "ended in RuntimeError: out of luck" in capsys.readouterr().out


def test_the_mixed_plan_stores_what_it_says(gpu: Any, tmp_path: Path) -> None:
    from kvprof.benchmark.subject import random_subject
    from kvprof.records.costs import costs

    subject = random_subject(*gpu.REAL.attention)
    check = gpu.Check(device=None, sizes=gpu.REAL, folder=tmp_path, is_toy=False)
    stored = {name: costs(plan, subject.geometry)[1] for name, plan in gpu.plans(check, subject).items()}
    assert stored == {"4 bits": 4.25, "mixed": 2.5}


def test_without_a_gpu_it_says_so(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="2"):
        gpu.main([str(tmp_path)])
    assert "torch finds no GPU here" in capsys.readouterr().err
