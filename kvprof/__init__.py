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

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BitPlan", "KvprofError", "Scores", "__version__"]

if TYPE_CHECKING:
    from kvprof.errors import KvprofError
    from kvprof.records.plan import BitPlan
    from kvprof.records.scores import Scores


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import kvprof` costs nothing."""
    if name == "KvprofError":
        from kvprof.errors import KvprofError

        return KvprofError
    if name == "BitPlan":
        from kvprof.records.plan import BitPlan

        return BitPlan
    if name == "Scores":
        from kvprof.records.scores import Scores

        return Scores
    raise AttributeError(f"module 'kvprof' has no attribute {name!r}")
