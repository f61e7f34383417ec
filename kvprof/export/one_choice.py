"""Runtimes with one choice for the whole cache: SGLang, LMDeploy, TensorRT-LLM, mlx-vlm.

--kv-cache-dtype fp8_e4m3                              SGLang (docs/advanced_features/quantized_kv_cache.md)
--quant-policy 8                                       LMDeploy (docs/en/quantization/kv_quant.md)
kv_cache_config: {dtype: fp8}                          TensorRT-LLM, in the YAML of --config (llm_args.py)
--kv-bits 4 --kv-group-size 64 --quantized-kv-start 0  mlx-vlm (docs/cli/generate.md)
"""

from __future__ import annotations

from collections.abc import Callable

from kvprof.allocate.grammars import OneOfAll, pairs_of
from kvprof.allocate.targets import Target
from kvprof.export.artefact import Artefact, skipped_remarks, told
from kvprof.records.external_formats import FOREIGN
from kvprof.records.plan import BitPlan


def write_sglang(plan: BitPlan, target: Target) -> Artefact:
    """Return SGLang's flag for a uniform plan."""
    return _written(plan, target, lambda word: f"--kv-cache-dtype {word}\n", ".args")


def write_lmdeploy(plan: BitPlan, target: Target) -> Artefact:
    """Return LMDeploy's flag for a uniform plan."""
    return _written(plan, target, lambda word: f"--quant-policy {word}\n", ".args")


def write_tensorrt_llm(plan: BitPlan, target: Target) -> Artefact:
    """Return TensorRT-LLM's YAML for a uniform plan."""
    made = _written(plan, target, lambda word: f"kv_cache_config:\n  dtype: {word}\n", ".yaml")
    if "nvfp4" not in made.text:
        return made
    remark = "TensorRT-LLM reads nvfp4 caches of checkpoints that Model-Optimizer quantized alone"
    return Artefact(made.text, made.suffix, (*made.remarks, remark))


def write_mlx_vlm(plan: BitPlan, target: Target) -> Artefact:
    """Return mlx-vlm's flags for a uniform plan; by itself it would leave the first 5,000 tokens alone."""

    def flags(word: str) -> str:
        form = FOREIGN[word]
        return f"--kv-bits {form.bits} --kv-group-size {form.block} --quantized-kv-start 0\n"

    return _written(plan, target, flags, ".args")


def _written(plan: BitPlan, target: Target, text: Callable[[str], str], suffix: str) -> Artefact:
    found = told(plan, target)
    grammar = target.grammar
    assert isinstance(grammar, OneOfAll)
    pair = next(iter(pairs_of(found.assignment).values()))
    return Artefact(
        text(grammar.word_for(pair)),
        suffix,
        (*found.remarks, *skipped_remarks(plan, target, "makes no difference of them")),
    )
