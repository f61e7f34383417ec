"""Short lives of what `tests/benchmarks/soak.py` lets live long: every promise is the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from soaking import LONG_OPERATIONS, Memory, Watch, decode, measure, operate


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_decoding_holds_its_promised_bytes_and_does_not_drift() -> None:
    seen = decode(steps=400, looks=4, seed=0)
    assert len(seen.furthest) == 4
    assert max(seen.furthest) < 5e-6  # a rotated number's last place, whatever the step
    assert seen.memory.slope("blocks") < 2  # a page every 512 tokens


def test_random_operations_with_saving_and_copying_hold_theirs(tmp_path: Path) -> None:
    counts, memory = operate(operations=160, looks=4, seed=1, folder=tmp_path)
    assert sum(counts.values()) == 160
    assert set(counts) == set(LONG_OPERATIONS)
    assert min(counts.values()) > 0
    # In saving, safetensors keeps a type of ctypes' for each new length of a tensor; a cache that is kept has more.
    assert memory.slope("blocks") < 40


def test_measuring_one_batch_after_another_takes_no_more_memory() -> None:
    memory = measure(batches=48, looks=6, seed=2, losses=True)
    assert memory.slope("blocks") < 150  # what was found of two sequences, for their standard errors


def test_a_leak_would_be_seen() -> None:
    kept, watch = [], Watch()
    for step in range(6):
        kept.append([object() for _ in range(1000)])
        watch.look(step)
    assert watch.memory.slope("blocks") == pytest.approx(1000, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_python_does_not_count_is_seen_too() -> None:
    kept, watch = [], Watch()
    for step in range(4):
        kept.append(torch.ones(2**20))
        watch.look(step)
    assert watch.memory.slope("resident") == pytest.approx(2**22, rel=0.3)
    assert watch.memory.slope("blocks") < 100


def test_a_slope_is_that_of_the_later_half() -> None:
    rows = np.arange(10)
    memory = Memory(tuple(rows), tuple(np.where(rows < 5, 100 * rows, 500 + 3 * rows)), tuple(7 * rows))
    assert memory.slope("blocks") == pytest.approx(3)
    assert memory.slope("resident") == pytest.approx(7)
