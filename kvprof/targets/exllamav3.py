"""ExLlamaV3: a Python module with a cache layer that knows each layer's bits, and the same bits as JSON in it.

Source: `exllamav3/cache/quant.py` (CacheLayer_quant(config, attention, cache_id, max_num_tokens, k_bits, v_bits)) and
`exllamav3/cache/cache.py`, which makes a `layer_type` for each attention layer, but where the layer's
`cache_layer_type` puts another class in its place (1.6.5). Sliding layers are such layers in Gemma 3, and keep a ring
in 16 bits of their own in the architectures of RINGS (sliding_attn.py).

A query reads its own token as stored: `attn_dispatch` quantizes it into the cache first (1.6.5,
`exllamav3/modules/attention_fn/dispatch.py`), but for heads that are no multiple of 32 channels or wider than 512.
"""

from __future__ import annotations

from kvprof.allocate.constraints import EachTensor, pairs_of
from kvprof.allocate.target import Target
from kvprof.records.external_formats import EXL3, EXTERNAL
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, skipped_remarks, told

RINGS = ("Gemma4", "GptOss", "Laguna", "MiMoV2", "Step3")
"""How architectures begin whose sliding layers ExLlamaV3 1.6.5 makes SlidingAttention of."""


def _refuses(geometry: CacheGeometry) -> str | None:
    """MLA's layers, which no target has, and those of a sparse attention's indexer bring a cache class of their own."""
    indexed = [shape.layer for shape in geometry.planned if shape.indexer_width]
    if not indexed:
        return None
    return f"layer {indexed[0]} has an indexer, and exllamav3 puts a cache of its own kind in the place of the plan's"


TARGET = Target(
    name="exllamav3",
    constraints=EachTensor(tuple(EXL3)),
    sliding="as told",
    refuses=_refuses,
    artefact="a Python snippet with a cache layer of its own, and its bits as JSON",
    since="the release whose CacheLayer_quant takes cache_id",
    checked="constructor against exllamav3/cache/quant.py of 1.6.5, which layers get it against its cache.py, "
    "sliding_attn.py and cache_layer_type, rounding against q_cache_kernels.cuh; its extension needs a GPU: not run",
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
    does = "must keep them apart, in 16 bits: the cache layer has no bits for them, and says so"
    remarks = [*found.remarks, *skipped_remarks(plan, TARGET, does)]
    shapes = [] if plan.geometry is None else [plan.geometry.layers[layer] for layer, _ in pairs]
    if (plan.model.architecture or "").startswith(RINGS) and any(shape.window for shape in shapes):
        remarks.append(
            "exllamav3 keeps this architecture's layers of a sliding window in 16 bits: it holds more, and loses less, "
            f"than the plan says; `kvprof allocate --target {TARGET.name} --layers full` counts them so"
        )
    return Artefact(_TEXT.format(bits=f"{{\n{lines}\n}}"), ".py", tuple(remarks))
