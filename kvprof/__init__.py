"""kvprof: which bits does a language model's KV cache need?

Words used throughout:

* nominal bits: the width of the integer code of one cached element.
* stored bits: nominal bits plus what each group stores beside its codes (scale and zero point), per element.
* axis `channel`: one scale per channel for each group of consecutive tokens (the usual choice for keys).
* axis `token`: one scale per token for each group of consecutive channels of one head (the usual choice for values).
* window: tokens kept in full precision: the first `sink_tokens`, and the most recent `recent_tokens`.
* 16 bits in a plan: kept in the model's own dtype; no codes, no scales.
* score: a number per layer for K and for V. Higher means more sensitive, so worth more bits.

Shapes: L layers, B batch, H KV heads, T tokens, D head dimension.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "BitPlan",
    "Evaluation",
    "KvprofError",
    "PlanCache",
    "Scores",
    "Spectra",
    "__version__",
    "allocate",
    "evaluate",
    "gradients",
    "norms",
    "spectra",
]

_HOMES = {
    "BitPlan": "kvprof.records.plan",
    "Evaluation": "kvprof.records.evaluation",
    "KvprofError": "kvprof.errors",
    "PlanCache": "kvprof.runtime.cache",
    "Scores": "kvprof.records.scores",
    "Spectra": "kvprof.records.spectra",
    "allocate": "kvprof.api.plan",
    "evaluate": "kvprof.api.quality",
    "gradients": "kvprof.api.measure",
    "norms": "kvprof.api.measure",
    "spectra": "kvprof.api.measure",
}
"""The module of each public name. Their types stand in __init__.pyi."""
_ROOMS = ("allocate", "evaluate")
"""Functions that have a package's name: the package itself is what is called, see callables.py."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import kvprof` costs nothing."""
    if name in _ROOMS:
        return import_module(f"kvprof.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvprof' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
