"""ExLlamaV3: a Python module with a cache layer that knows each layer's bits, and the same bits as JSON in it.

Source: `exllamav3/cache/quant.py` (CacheLayer_quant(config, attention, cache_id, max_num_tokens, k_bits, v_bits)) and
`exllamav3/cache/cache.py`, which makes a `layer_type` for each attention layer.

A query reads its own token as stored: `attn_dispatch` quantizes it into the cache first (1.6.5,
`exllamav3/modules/attention_fn/dispatch.py`), but for heads that are no multiple of 32 channels or wider than 512.
"""

from __future__ import annotations

from kvprof.allocate.constraints import EachTensor, pairs_of
from kvprof.allocate.target import Target
from kvprof.records.external_formats import EXL3, EXTERNAL
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, skipped_remarks, told

TARGET = Target(
    name="exllamav3",
    constraints=EachTensor(tuple(EXL3)),
    artefact="a Python snippet with a cache layer of its own, and its bits as JSON",
    since="the release whose CacheLayer_quant takes cache_id",
    checked="constructor against exllamav3/cache/quant.py, rounding against q_cache_kernels.cuh; not run",
)

_TEXT = '''"""A cache layer for ExLlamaV3, as kvprof planned it.

    Cache(model, max_num_tokens=8192, layer_type=PlannedCacheLayer)
"""

import json

from exllamav3.cache.quant import CacheLayer_quant

BITS = json.loads("""
{bits}
""")
"""[k_bits, v_bits] of each layer."""


class PlannedCacheLayer(CacheLayer_quant):
    def __init__(self, config, attention, cache_id, max_num_tokens, **kwargs):
        if str(attention.layer_idx) not in BITS:
            raise KeyError(f"the plan gives no bits to layer {{attention.layer_idx}}")
        k_bits, v_bits = BITS[str(attention.layer_idx)]
        super().__init__(config, attention, cache_id, max_num_tokens, k_bits=k_bits, v_bits=v_bits, **kwargs)
'''


def write(plan: BitPlan) -> Artefact:
    """Return the module for a plan of 2 to 8 bits for each layer's keys and values."""
    found = told(plan, TARGET)
    pairs = pairs_of(found.assignment).items()
    lines = ",\n".join(f'  "{layer}": [{EXTERNAL[key].bits}, {EXTERNAL[value].bits}]' for layer, (key, value) in pairs)
    does = "must keep them apart, as it does sliding windows: the cache layer has no bits for them, and says so"
    remarks = (*found.remarks, *skipped_remarks(plan, TARGET, does))
    return Artefact(_TEXT.format(bits=f"{{\n{lines}\n}}"), ".py", remarks)
