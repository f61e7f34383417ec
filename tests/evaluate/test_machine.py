"""What is said of the machine: its cache, what a container leaves, and how much memory a step takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvprof.evaluate import machine

CPU = torch.device("cpu")


def test_the_last_cache_is_the_largest_that_the_system_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, size in enumerate(("32K\n", "1M\n", "not a size", "768\n")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.describe_device(CPU).cache_bytes == 2**20
    monkeypatch.setattr(machine, "_CACHES", tmp_path / "none")
    assert machine.describe_device(CPU).cache_bytes == machine.USUAL_CPU_CACHE


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    whole = machine.free_bytes(CPU)
    assert 0 < whole <= machine.describe_device(CPU).memory_bytes
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 500000\n")  # files that can be let go
    assert machine.free_bytes(CPU) == 2_500_000
    assert machine.describe_device(CPU).memory_bytes == 5_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_bytes(CPU) > 2_500_000


def test_the_peak_is_of_what_was_freed_too() -> None:
    before = machine.settled_bytes(CPU)
    with machine.peak_memory(CPU, before) as peak:
        block = torch.ones(2**26, dtype=torch.uint8)
        machine.threading.Event().wait(5 * machine.SAMPLE_SECONDS)
        del block
    assert peak.bytes >= 2**25


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
    assert machine.free_bytes(gpu) == 35  # blocks that torch holds idle are free for it
    assert "cuda" in machine.versions(gpu)


def test_of_a_gpu_the_peak_is_all_that_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: steps.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: steps.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    with machine.peak_memory(torch.device("cuda"), baseline=100) as peak:
        steps.append("run")
    assert (peak.bytes, steps) == (123, ["reset", "run", "wait"])
