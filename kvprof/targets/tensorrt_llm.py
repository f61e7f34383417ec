"""TensorRT-LLM: one field of the YAML of --config for the whole cache.

    kv_cache_config: {dtype: fp8}

Source: `llm_args.py`.

A query reads its own token as stored: the kernels of generation (XQA) read the cache, which the one before them wrote.
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, OneOfAll
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact
from kvprof.targets.one_choice import written

TARGET = Target(
    name="tensorrt-llm",
    constraints=OneOfAll(
        {
            "auto": (FULL, FULL),
            "fp8": ("fp8_e4m3", "fp8_e4m3"),
            "nvfp4": ("nvfp4", "nvfp4"),
        }
    ),
    artefact="YAML: kv_cache_config: dtype: X",
    since="a release whose YAML has kv_cache_config (1.1 does)",
    checked="field against llm_args.py and the published examples; not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return the YAML for a uniform plan."""
    made = written(plan, TARGET, lambda word: f"kv_cache_config:\n  dtype: {word}\n", ".yaml")
    if "nvfp4" not in made.text:
        return made
    remark = "TensorRT-LLM reads nvfp4 caches of checkpoints that Model-Optimizer quantized alone"
    return Artefact(made.text, made.suffix, (*made.remarks, remark))
