"""Where and how attention is timed, and how a run of it is written down.

Makes random keys and values on a device; writes records of times and bytes. Does not know whose attention it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprof.records.benchmark import AttentionRun, Timing
from kvprof.runtime.kernels.dispatch import Kernels

FILL_BYTES = 256 * 2**20
"""Of the keys or values that are put into a cache at once."""


@dataclass(frozen=True)
class Bench:
    """Where and how attention is timed.

    cache_bytes: of the device, which the rotating buffers exceed. copy_rate: the measured bytes a second of a copy.
    """

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    query_heads: int
    cache_bytes: int
    copy_rate: float
    repeats: int
    seed: int

    def random(self, batch: int, heads: int, tokens: int, head_dim: int, number: int = 0) -> Tensor:
        """Return normal numbers, (batch, heads, tokens, head_dim), the same for the same `number`."""
        generator = torch.Generator(self.device).manual_seed(self.seed + number)
        shape = (batch, heads, tokens, head_dim)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)


def fill_tokens(elements: int, dtype: torch.dtype) -> int:
    """Return how many tokens of so many elements are put into a cache at once."""
    return max(256, FILL_BYTES // (elements * dtype.itemsize))


def run_maker(name: str, dtype: torch.dtype, held: int, bench: Bench) -> Callable[..., AttentionRun]:
    """Return what makes the record of a run, of its time and buffers or of the reason that there is none."""

    def make(result: Timing | str, buffer_bytes: int | None = None) -> AttentionRun:
        words = {"name": name, "dtype": str(dtype).removeprefix("torch."), "bytes": held}
        if isinstance(result, str):
            return AttentionRun.model_validate(words | {"reason": result})
        rate = held / result.median_seconds if result.median_seconds and held else None
        return AttentionRun.model_validate(
            words
            | {
                "timing": result,
                "bytes_per_second": rate,
                "copy_fraction": None if rate is None else rate / bench.copy_rate,
                "buffer_bytes": buffer_bytes,
            }
        )

    return make
