"""What formats change of the loss to first order, for a layer whose attention weights nobody can tell.

Asks the layer's own attention once more for each format, and takes the difference of whole outputs: slower than
format_effects.py, and right whatever the attention does.
"""

from __future__ import annotations

import functools

from torch import Tensor

from kvprof.profile.format_changes import Asked, LayerFormats
from kvprof.records.formats import FULL_BITS, TENSORS
from kvprof.records.plan import TensorPlan
from kvprof.runtime.attention.patch import AttentionCall
from kvprof.runtime.attention.reference import attend_as_decoding

_UNTOUCHED = TensorPlan(bits=FULL_BITS, group_size=1, axis="token")


def output_effects(
    call: AttentionCall, wide: AttentionCall, gradient: Tensor, asked: LayerFormats
) -> dict[Asked, Tensor]:
    """Return g . d of every format for the queries that are asked, (B, T - first) each, in float64.

    call: in whose dtype keys and values are rounded. wide: the call in the dtype to compute in, or the same one.
    gradient: at the output, (B, T - first, query heads, D).
    """
    attend = functools.partial(
        attend_as_decoding, call, window=asked.window, quantizer=asked.quantizer, first=asked.first, wide=wide
    )
    exact = attend(_UNTOUCHED, _UNTOUCHED)
    found = {}
    for tensor, name, form in asked.formats:
        delta = attend(*(form if one == tensor else _UNTOUCHED for one in TENSORS)).sub_(exact)
        found[tensor, name] = delta.mul_(gradient).double().flatten(2).sum(-1)
    return found
