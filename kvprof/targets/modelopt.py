"""NVIDIA Model-Optimizer: the `hf_quant_config.json` of a checkpoint whose cache has a format for each layer.

Source: the KV cache's layer map, schema version 1, as Model-Optimizer's own unit tests have it (pull request 2272). No
release of a runtime reads the map: vLLM 0.33.0 takes `kv_cache_quant_algo` alone, and MIXED_PRECISION there is 16 bits
everywhere, with a warning (`vllm/utils/torch_utils.py`, get_kv_cache_quant_algo_string); its pull request 56116 reads
it. A layer without an entry stays in 16 bits.

A query reads its own token as stored, as in vLLM and TensorRT-LLM, which serve such checkpoints.
"""

from __future__ import annotations

import json

from kvprof import __version__
from kvprof.allocate.constraints import FULL, EachLayer, pairs_of
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, skipped_remarks, told

SCHEMA_VERSION = 1
MIXED = "MIXED_PRECISION"

TARGET = Target(
    name="modelopt",
    constraints=EachLayer({"FP8": ("fp8_e4m3", "fp8_e4m3"), "NVFP4": ("nvfp4", "nvfp4"), FULL: (FULL, FULL)}),
    sliding="as told",
    artefact="hf_quant_config.json, schema version 1",
    since="Model-Optimizer with pull request 2272; vLLM reads it with pull request 56116, open when checked",
    checked="fields against Model-Optimizer's own unit tests, what vLLM 0.33.0 makes of them by its source; not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return the file for a plan whose layers have FP8 or NVFP4 for keys and values alike."""
    found = told(plan, TARGET)
    constraints = TARGET.constraints
    assert isinstance(constraints, EachLayer)
    pairs = pairs_of(found.assignment)
    layers = {layer: constraints.word_for(pair) for layer, pair in pairs.items() if pair != (FULL, FULL)}
    words = set(layers.values())
    is_uniform = len(words) == 1 and len(layers) == len(pairs) and not plan.skipped
    config = {
        "producer": {"name": "kvprof", "version": __version__},
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": words.pop() if is_uniform else MIXED if layers else None,
            "kv_cache_quantized_layers": {
                f"model.layers.{layer}.self_attn": {"quant_algo": word} for layer, word in layers.items()
            },
            "kv_cache_schema_version": SCHEMA_VERSION,
        },
    }
    remarks = [
        *found.remarks,
        *skipped_remarks(plan, TARGET, "has no entry for them, and so leaves them in 16 bits"),
        "no released runtime reads the layer map: vLLM 0.33.0 takes MIXED_PRECISION for 16 bits everywhere, with a "
        "warning, and refuses a file without quant_algo; its pull request 56116, open when this was checked, reads it",
        "layers are named model.layers.N.self_attn: rename them where the checkpoint calls them otherwise",
    ]
    return Artefact(json.dumps(config, indent=2) + "\n", ".hf_quant_config.json", tuple(remarks))
