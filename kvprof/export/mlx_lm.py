"""mlx-lm: a Python module that builds the prompt cache, layer by layer.

Source: `mlx_lm/models/cache.py` (QuantizedKVCache(group_size, bits), make_prompt_cache). A cache passed to `generate`
as `prompt_cache` is left as it is where `kv_bits` is not given (`mlx_lm/generate.py`).
"""

from __future__ import annotations

from kvprof.allocate.grammars import FULL, pairs_of
from kvprof.allocate.targets import Target
from kvprof.export.artefact import Artefact, told
from kvprof.records.external_formats import FOREIGN
from kvprof.records.plan import BitPlan

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


def write_mlx_lm(plan: BitPlan, target: Target) -> Artefact:
    """Return the module for a plan whose layers have equal bits and groups for keys and values."""
    found = told(plan, target)
    entries = [
        f"{layer}: ({FOREIGN[name].bits}, {FOREIGN[name].block})"
        for layer, (name, _) in pairs_of(found.assignment).items()
        if name != FULL
    ]
    return Artefact(_TEXT.format(entries=", ".join(entries)), ".py", found.remarks)
