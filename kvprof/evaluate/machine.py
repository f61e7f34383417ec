"""The machine that a benchmark runs on: what it is, what it has free, and how much of it a step takes.

Reads the device's own words and the operating system's. Writes nothing; does not know what is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import platform
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from kvprof import __version__
from kvprof.records.benchmark import DeviceInfo
from kvprof.records.geometry import bytes_text

USUAL_CPU_CACHE = 64 * 2**20
"""Bytes of a CPU's last cache, where the system does not tell."""
SAMPLE_SECONDS = 0.002
"""Between two looks at how much memory the process has."""
PACKAGES = ("numpy", "torch", "transformers", "triton", "flash-attn")

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_GROUP = Path("/sys/fs/cgroup")


def describe_device(device: torch.device) -> DeviceInfo:
    """Return a device's name, its memory, and the cache that rotating buffers must exceed."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return DeviceInfo(
            type="cuda",
            name=found.name,
            memory_bytes=found.total_memory,
            cache_bytes=found.L2_cache_size or USUAL_CPU_CACHE,
            compute_capability=f"{found.major}.{found.minor}",
        )
    return DeviceInfo(
        type=device.type,
        name=_cpu_name() if device.type == "cpu" else device.type,
        memory_bytes=_limit_bytes(),
        cache_bytes=_cpu_cache_bytes(),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
    )


def versions(device: torch.device) -> dict[str, str]:
    """Return what runs here, by version: Python, kvprof, libraries, and of a GPU CUDA and its driver."""
    found = {"python": platform.python_version(), "kvprof": __version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["torch"] = torch.__version__  # with what it was built for
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        with contextlib.suppress(OSError):
            driver = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text())
            found |= {"driver": driver[1]} if driver else {}
    return found


def free_bytes(device: torch.device) -> int:
    """Return how much memory can be taken without driving anything else out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own idle blocks
        return int(free)
    return max(0, min(int(psutil.virtual_memory().available), _limit_bytes() - _used_bytes()))


def room(needed: int, free: int) -> str:
    """Return why something is left out that needs more than is free, in bytes."""
    return f"{bytes_text(needed)} are needed, {bytes_text(free)} are free"


@dataclass
class Peak:
    """The most memory that was taken while a `with` lasted."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device, baseline: int = 0) -> Iterator[Peak]:
    """Watch the memory while the `with` lasts; afterwards the result says what its peak was.

    baseline: of a CPU, what the process had before, and is not counted. On a GPU all that is allocated is counted.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    if device.type != "cpu":
        yield peak
        return
    most = [resident_bytes()]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            most.append(max(most.pop(), resident_bytes()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
    peak.bytes = max(0, max(most[-1], resident_bytes()) - baseline)


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


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or "a CPU"


def _cpu_cache_bytes() -> int:
    """Return the size of the largest cache of the first core, as Linux has it; elsewhere USUAL_CPU_CACHE."""
    sizes = [0]
    for file in _CACHES.glob("index*/size"):
        with contextlib.suppress(OSError):
            found = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
            sizes += [int(found[1]) * 1024 ** " KMG".index(found[2] or " ")] if found else []
    return max(sizes) or USUAL_CPU_CACHE


def _limit_bytes() -> int:
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
