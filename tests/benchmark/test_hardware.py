"""What is said of the machine: its cache, what a container leaves, and how much memory a step takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvprof.benchmark import hardware as machine
from kvprof.models import memory

CPU = torch.device("cpu")


def test_the_last_cache_is_the_largest_that_the_system_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, size in enumerate(("32K\n", "1M\n", "not a size", "768\n")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.describe_device(CPU).cache_bytes == 2**20
    monkeypatch.setattr(machine, "_CACHES", tmp_path / "none")
    assert machine.describe_device(CPU).cache_bytes == machine.USUAL_CPU_CACHE


def test_libraries_are_named_with_their_versions() -> None:
    found = machine.versions(CPU)
    assert found["torch"] == torch.__version__
    assert {"python", "kvprof", "transformers"} <= set(found)
    assert "cuda" not in found


def test_a_gpu_is_described_by_what_torch_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="NVIDIA X", total_memory=80, L2_cache_size=50, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15)
    gpu = torch.device("cuda")
    found = machine.describe_device(gpu)
    assert (found.name, found.memory_bytes, found.cache_bytes, found.compute_capability) == ("NVIDIA X", 80, 50, "9.0")
    assert found.threads is None
    assert memory.free_bytes(gpu) == 35  # blocks that torch holds idle are free for it
    assert "cuda" in machine.versions(gpu)


def test_of_a_gpu_the_peak_is_all_that_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: steps.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: steps.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    with memory.peak_memory(torch.device("cuda"), baseline=100) as peak:
        steps.append("run")
    assert (peak.bytes, steps) == (123, ["reset", "run", "wait"])
