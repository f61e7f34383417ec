"""How much memory there is, how much of it is free, and how much of it a step takes.

Reads the device's own words and the operating system's. Does not know what takes the memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from kvprof.errors import OutOfMemory, is_out_of_memory

SAMPLE_SECONDS = 0.002
"""Between two looks at how much memory the process has."""

_GROUP = Path("/sys/fs/cgroup")
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def free_bytes(device: torch.device) -> int:
    """Return how much memory can be taken without driving anything else out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own idle blocks
        return int(free)
    return max(0, min(int(psutil.virtual_memory().available), limit_bytes() - _used_bytes()))


@contextlib.contextmanager
def memory_explained(message: str) -> Iterator[None]:
    """Turn whatever a device says when its memory does not suffice into OutOfMemory with this message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(message) from None


@dataclass
class Peak:
    """The most memory that was taken while a `with` lasted, or since `restart`."""

    bytes: int | None = None
    most: int = 0
    baseline: int = 0

    def restart(self) -> None:
        """Forget what was taken so far: of a CPU, what the process has now is not counted any more."""
        self.baseline = self.most = resident_bytes()


@contextlib.contextmanager
def peak_memory(device: torch.device, baseline: int = 0) -> Iterator[Peak]:
    """Watch the memory while the `with` lasts; afterwards the result says what its peak was.

    baseline: of a CPU, what the process had before, and is not counted. On a GPU all that is allocated is counted.
    """
    peak = Peak(most=resident_bytes(), baseline=baseline)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    if device.type != "cpu":
        yield peak
        return
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            peak.most = max(peak.most, resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
    peak.bytes = max(0, max(peak.most, resident_bytes()) - peak.baseline)


def settled_bytes(device: torch.device) -> int:
    """Give back to the system what was freed, where that can be; return the memory that this process has then."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what was freed, and new tensors then take no more
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def resident_bytes() -> int:
    """Return the memory that this process has."""
    return int(psutil.Process().memory_info().rss)


def limit_bytes() -> int:
    """Return the memory of the machine, or of the container where it has less."""
    limits = [int(psutil.virtual_memory().total)]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((_GROUP / name).read_text()))
    return min(limits)


def _used_bytes() -> int:
    """Return how much of a container's memory is taken, files that can be let go apart; 0 where there is none."""
    for folder, name in ((_GROUP, "memory.current"), (_GROUP / "memory", "memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):
            used = int((folder / name).read_text())
            files = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            return used - (int(files[1]) if files else 0)
    return 0


def return_freed_memory() -> None:
    """Let glibc give every tensor back to the system when it is freed, rather than keep it for others of its size.

    For a process that holds a block at a time; it costs a little time, and lasts. Elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
