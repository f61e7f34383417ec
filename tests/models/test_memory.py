"""What memory a container leaves, and how much of it a step takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvprof.models import memory

CPU = torch.device("cpu")


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    whole = memory.free_bytes(CPU)
    assert 0 < whole <= memory.limit_bytes()
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 500000\n")  # files that can be let go
    assert memory.free_bytes(CPU) == 2_500_000
    assert memory.limit_bytes() == 5_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) > 2_500_000


def test_the_peak_is_of_what_was_freed_too() -> None:
    before = memory.settled_bytes(CPU)
    with memory.peak_memory(CPU, before) as peak:
        block = torch.ones(2**26, dtype=torch.uint8)
        memory.threading.Event().wait(5 * memory.SAMPLE_SECONDS)
        del block
    assert peak.bytes >= 2**25


def test_what_was_taken_before_a_restart_is_not_counted() -> None:
    with memory.peak_memory(CPU, 0) as peak:
        block = torch.ones(2**27, dtype=torch.uint8)
        memory.threading.Event().wait(5 * memory.SAMPLE_SECONDS)
        peak.restart()
        memory.threading.Event().wait(5 * memory.SAMPLE_SECONDS)
        del block
    assert peak.bytes < 2**26
