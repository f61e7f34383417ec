"""NVIDIA Model-Optimizer: the `hf_quant_config.json` of a checkpoint whose cache has a format for each layer.

Source: the KV cache's layer map, schema version 1, as Model-Optimizer's own unit tests have it (pull request 2272).
"""

from __future__ import annotations

import json

from kvprof import __version__
from kvprof.allocate.grammars import EachLayer, pairs_of
from kvprof.allocate.targets import Target
from kvprof.export.artefact import Artefact, skipped_remarks, told
from kvprof.records.plan import BitPlan

SCHEMA_VERSION = 1
MIXED = "MIXED_PRECISION"


def write_modelopt(plan: BitPlan, target: Target) -> Artefact:
    """Return the file for a plan whose layers have FP8 or NVFP4 for keys and values alike."""
    found = told(plan, target)
    grammar = target.grammar
    assert isinstance(grammar, EachLayer)
    layers = {layer: grammar.word_for(pair) for layer, pair in pairs_of(found.assignment).items()}
    words = set(layers.values())
    config = {
        "producer": {"name": "kvprof", "version": __version__},
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": words.pop() if len(words) == 1 and not plan.skipped else MIXED,
            "kv_cache_quantized_layers": {
                f"model.layers.{layer}.self_attn": {"quant_algo": word} for layer, word in layers.items()
            },
            "kv_cache_schema_version": SCHEMA_VERSION,
        },
    }
    remarks = [
        *found.remarks,
        *skipped_remarks(plan, target, "has no entry for them, and so leaves them in 16 bits"),
        "vLLM reads the layer map with its pull request 56116, which was open when this was checked; releases before "
        "it read one kv_cache_quant_algo for all layers, and refuse a file without quant_algo",
        "layers are named model.layers.N.self_attn: rename them where the checkpoint calls them otherwise",
    ]
    return Artefact(json.dumps(config, indent=2) + "\n", ".hf_quant_config.json", tuple(remarks))
