"""mlx-lm: a Python module that builds the prompt cache, layer by layer.

Source: `mlx_lm/models/cache.py` (QuantizedKVCache(group_size, bits), make_prompt_cache). A cache passed to `generate`
as `prompt_cache` is left as it is where `kv_bits` is not given (`mlx_lm/generate.py`).

A query reads its own token as stored: `QuantizedKVCache.update_and_fetch` gives back what it has quantized (0.32.2).
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, EachLayer, pairs_of
from kvprof.allocate.target import Target
from kvprof.records.external_formats import EXTERNAL, MLX
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, told

PAIRS = {name: (name, name) for name in (*MLX, FULL)}
"""Bits and group size, alike for keys and values."""

TARGET = Target(
    name="mlx-lm",
    constraints=EachLayer(PAIRS),
    sliding="full",
    artefact="a Python snippet that builds the prompt cache",
    since="the release that has QuantizedKVCache",
    checked="the module run, its rounding and its bytes against mlx's own (mlx-lm 0.32.2, mlx 0.32.4 on a CPU)",
)

_TEXT = '''"""A prompt cache for mlx-lm, as kvprof planned it.

    generate(model, tokenizer, prompt, prompt_cache=planned_cache(model))
"""

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

BITS_AND_GROUP_SIZE = {{{entries}}}
"""Of each layer that is quantized; the others keep the cache that the model makes."""


class PlannedKVCache(QuantizedKVCache):
    """For 3, 5 and 6 bits: mlx-lm's first zeros have room for whole codes a word, mx.quantize packs without gaps."""

    def update_and_fetch(self, keys, values):
        if self.keys is None:
            self.keys, self.values = (
                tuple(part[..., :0, :] for part in mx.quantize(new, group_size=self.group_size, bits=self.bits))
                for new in (keys, values)
            )
        return super().update_and_fetch(keys, values)


def planned_cache(model):
    cache = make_prompt_cache(model)
    for layer, (bits, group_size) in BITS_AND_GROUP_SIZE.items():
        if type(cache[layer]) is not KVCache:
            raise TypeError(f"layer {{layer}} has a {{type(cache[layer]).__name__}}, which the plan does not know")
        kind = QuantizedKVCache if 32 % bits == 0 else PlannedKVCache
        cache[layer] = kind(group_size=group_size, bits=bits)
    return cache
'''


def write(plan: BitPlan) -> Artefact:
    """Return the module for a plan whose layers have equal bits and groups for keys and values."""
    found = told(plan, TARGET)
    entries = [
        f"{layer}: ({EXTERNAL[name].bits}, {EXTERNAL[name].block})"
        for layer, (name, _) in pairs_of(found.assignment).items()
        if name != FULL
    ]
    return Artefact(_TEXT.format(entries=", ".join(entries)), ".py", found.remarks)
