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
    checked="names and arguments against mlx_lm/models/cache.py, rounding against mlx's CPU source; not run",
)

_TEXT = '''"""A prompt cache for mlx-lm, as kvprof planned it.

    generate(model, tokenizer, prompt, prompt_cache=planned_cache(model))
"""

from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

BITS_AND_GROUP_SIZE = {{{entries}}}
"""Of each layer that is quantized; the others keep the cache that the model makes."""


def planned_cache(model):
    cache = make_prompt_cache(model)
    for layer, (bits, group_size) in BITS_AND_GROUP_SIZE.items():
        if type(cache[layer]) is not KVCache:
            raise TypeError(f"layer {{layer}} has a {{type(cache[layer]).__name__}}, which the plan does not know")
        cache[layer] = QuantizedKVCache(group_size=group_size, bits=bits)
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
