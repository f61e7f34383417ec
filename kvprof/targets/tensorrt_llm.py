"""TensorRT-LLM: one field of the YAML of --config for the whole cache.

    kv_cache_config: {dtype: fp8}

Source: `tensorrt_llm/llmapi/llm_args.py` (KvCacheConfig.dtype, sync_quant_config_with_kv_cache_config_dtype), main of
autumn 2026. Ranges of layers (`0-3:fp8,4-35:nvfp4`) are an open pull request, 13695.

A query reads its own token as stored: the kernels of generation (XQA) read the cache, which the one before them wrote.
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, OneOfAll
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact
from kvprof.targets.one_choice import UNQUANTIZED, written

TARGET = Target(
    name="tensorrt-llm",
    constraints=OneOfAll(
        {
            UNQUANTIZED: (FULL, FULL),
            "fp8": ("fp8_e4m3", "fp8_e4m3"),
            "nvfp4": ("nvfp4", "nvfp4"),
        }
    ),
    artefact="YAML: kv_cache_config: dtype: X",
    since="a release whose YAML has kv_cache_config (1.1 does); a format for each layer is pull request 13695, open",
    checked="field and words against llm_args.py and the published examples; not run",
)

REMARKS = {
    "nvfp4": ("TensorRT-LLM reads nvfp4 caches of checkpoints that Model-Optimizer quantized alone",),
    UNQUANTIZED: (
        "a checkpoint that brings an FP8 cache keeps it: TensorRT-LLM warns that no dtype of 16 bits undoes that",
    ),
}
"""What to know of a word."""


def write(plan: BitPlan) -> Artefact:
    """Return the YAML for a uniform plan."""
    unquantized = "auto" if plan.geometry is None else plan.geometry.dtype

    def text(word: str) -> str:
        return f"kv_cache_config:\n  dtype: {unquantized if word == UNQUANTIZED else word}\n"

    return written(plan, TARGET, text, ".yaml", lambda word: REMARKS.get(word, ()))
