"""Who packs, unpacks and attends: plain torch anywhere, Triton's kernels on a GPU.

Reads what the machine has; chosen once a cache. Does not know formats nor blocks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvprof.errors import CacheError, did_you_mean
from kvprof.runtime.kernels import torch_kernels

KERNELS = ("auto", "triton", "torch")


@dataclass(frozen=True)
class Kernels:
    """The cache's three operations; `runtime.kernels.torch_kernels` says what each one does.

    why_not: says why `attend` does not take a query, its history and its mask, or None where it does.
    """

    name: str
    pack_tokens: Callable[..., Any]
    unpack_tokens: Callable[..., Any]
    attend: Callable[..., Any]
    why_not: Callable[..., str | None]


TORCH = Kernels(
    "torch", torch_kernels.pack_tokens, torch_kernels.unpack_tokens, torch_kernels.attend, torch_kernels.why_not
)


def kernels_named(name: str, device: torch.device | str) -> Kernels:
    """Return the kernels of a name for keys and values on a device; `auto` is the fastest that runs there.

    Raises CacheError for a name that there is not, and for `triton` where it cannot run: without the package, or where
    there is no GPU and TRITON_INTERPRET=1 does not ask for Triton's interpreter.
    """
    if name not in KERNELS:
        raise CacheError(f"unknown kernels {name!r}: {did_you_mean(name, KERNELS)}")
    device = torch.device(device)
    installed = importlib.util.find_spec("triton") is not None
    if name == "torch" or (name == "auto" and not (installed and device.type == "cuda")):
        return TORCH
    if not installed:
        raise CacheError("kernels 'triton' need the package triton.\n  pip install 'kvprof-bits[gpu]'")

    from kvprof.runtime.kernels import triton_kernels

    if device.type != "cuda" and not triton_kernels.INTERPRETED:
        raise CacheError(
            f"kernels 'triton' need a GPU, the model is on {device}.\n"
            "  Take kernels='auto', or set TRITON_INTERPRET=1 to run them slowly on the CPU."
        )
    return Kernels(
        "triton",
        triton_kernels.pack_tokens,
        triton_kernels.unpack_tokens,
        triton_kernels.attend,
        triton_kernels.why_not,
    )
