"""compressed-tensors: the `quantization_config` of a checkpoint's config.json, whose cache is in 8-bit floats.

    {"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, ...}, ...}}

Sources: `compressed_tensors/quantization/quant_config.py` and `quant_args.py` of 0.20.1; vLLM 0.33.0 reads it
(`vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py`, validate_kv_cache_scheme: 8-bit
symmetric floats, with static scales of a tensor or of a head).

A query reads its own token as stored, as in vLLM.
"""

from __future__ import annotations

import json

from kvprof.allocate.constraints import OneOfAll
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact
from kvprof.targets.one_choice import written

KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

TARGET = Target(
    name="compressed-tensors",
    constraints=OneOfAll({"float 8": ("fp8_e4m3", "fp8_e4m3")}),
    artefact="JSON: quantization_config with a kv_cache_scheme",
    since="the release that has kv_cache_scheme (0.20.1 does); vLLM reads it",
    checked="read by QuantizationConfig of 0.20.1; what vLLM 0.33.0 takes by its source, not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return the part of config.json for a uniform plan; weights stay as they are."""
    config = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": KV_CACHE_SCHEME,
    }
    text = json.dumps({"quantization_config": config}, indent=2) + "\n"
    remarks = (
        "for a checkpoint of unquantized weights; of another, put kv_cache_scheme into its own quantization_config",
        "scored with a scale of 1, which vLLM takes where the checkpoint has no k_scale and v_scale",
    )
    return written(plan, TARGET, lambda word: text, ".json", lambda word: remarks)
