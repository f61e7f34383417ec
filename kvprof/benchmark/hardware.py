"""The machine that a benchmark runs on: what it is, what it has free, and how much of it a step takes.

Reads the device's own words and the operating system's. Writes nothing; does not know what is timed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from kvprof import __version__
from kvprof.models.memory import limit_bytes
from kvprof.records.benchmark import DeviceInfo
from kvprof.records.geometry import bytes_text

USUAL_CPU_CACHE = 64 * 2**20
"""Bytes of a CPU's last cache, where the system does not tell."""
PACKAGES = ("numpy", "torch", "transformers", "triton", "flash-attn")

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


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
        memory_bytes=limit_bytes(),
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


def room(needed: int, free: int) -> str:
    """Return why something is left out that needs more than is free, in bytes."""
    return f"{bytes_text(needed)} are needed, {bytes_text(free)} are free"


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
