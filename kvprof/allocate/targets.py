"""Runtimes that plans are made for: what each can be told, in which formats, and what was checked of that.

Plain data. Does not know how a plan is solved within a grammar (within.py), nor how it is written (export).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

from kvprof.allocate.budget import CachedTensor
from kvprof.allocate.grammars import (
    FULL,
    EachLayer,
    EachTensor,
    FirstLastRest,
    Grammar,
    KeysAndValues,
    OneOfAll,
    SomeInFull,
)
from kvprof.errors import UsageError, did_you_mean
from kvprof.records.external_formats import EXL3, FOREIGN, GGML, MLX
from kvprof.records.formats import TENSORS, Format, TensorName, format_named
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import LAYER_CHOICES, USUAL_WINDOW, BitPlan, LayerChoice, Window

WHOLE_CACHE = Window(sink_tokens=0, recent_tokens=0)
"""Every token is quantized as it comes."""


@dataclass(frozen=True)
class Target:
    """A runtime that plans can be made for.

    grammar: what it can be told; None where it obeys any plan of kvprof's own formats. artefact: what `kvprof export`
    writes. since: the version that understands it. checked: what was held against what. window: what it keeps in full
    precision. full: its own word for 16 bits. sliding: what it does with layers of a sliding window: as they are told
    one by one, quantizes them like the others, or keeps them in 16 bits.
    """

    name: str
    grammar: Grammar | None
    artefact: str
    since: str
    checked: str
    window: Window = WHOLE_CACHE
    full: str = FULL
    sliding: Literal["as told", "quantized", "full"] = "quantized"

    def formats_of(self, tensor: TensorName) -> tuple[str, ...]:
        """Return the formats, by name, that keys or values can have; none where any of kvprof's own will do."""
        return () if self.grammar is None else self.grammar.formats_of(tensor)

    def forms(self, tensor: CachedTensor) -> dict[str, Format]:
        """Return the formats by name that a tensor can have, those left out that its heads cannot."""
        found = {}
        for name in self.formats_of(tensor.name):
            with contextlib.suppress(UsageError):
                found[name] = format_named(name, tensor.stored_as, tensor.head_dim)
        return found

    @property
    def to_score(self) -> dict[TensorName, tuple[str, ...]] | None:
        """The formats that its plans need scores of; None where kvprof's usual ones will do."""
        if self.grammar is None:
            return None
        return {tensor: tuple(name for name in self.formats_of(tensor) if name != FULL) for tensor in TENSORS}

    def word(self, name: str) -> str:
        """Return the runtime's own word for a format that it knows by the name that kvprof has for it."""
        return self.full if name == FULL else name

    def stored_bits(self) -> list[tuple[str, str]]:
        """Return each of the runtime's own words with the bits that an element then stores; D is the head dimension."""
        if self.grammar is None:
            return []
        rows = []
        for word, forms in self.grammar.choices().items():
            bits = dict.fromkeys(map(_stored_bits, forms))
            rows.append((self.word(word), next(iter(bits)) if len(bits) == 1 else "K {} V {}".format(*bits)))
        return rows

    @property
    def words(self) -> str:
        """What the runtime can be told, in words."""
        return "any plan of kvprof's own formats" if self.grammar is None else self.grammar.words


def target_named(name: str) -> Target:
    """Return a target; raises UsageError for a name that is none."""
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}: {did_you_mean(name, TARGETS)}")
    return TARGETS[name]


def layer_choice(layers: str | None, target: Target | None, geometry: CacheGeometry | None = None) -> LayerChoice:
    """Return whether plans cover sliding layers: as is asked for, else as the runtime does, else they do.

    geometry: None where it is not known whether there are any.
    Raises UsageError for another word, or one that the runtime cannot be told.
    """
    if layers is None:
        return "full" if target is not None and target.sliding == "full" else "all"
    if layers not in LAYER_CHOICES:
        raise UsageError(f"--layers {layers!r}: {did_you_mean(layers, LAYER_CHOICES)}")
    if target is not None and (geometry is None or geometry.sliding):
        fixed = {"quantized": "all", "full": "full"}.get(target.sliding, layers)
        if layers != fixed:
            does = "keeps them in 16 bits" if fixed == "full" else "quantizes them like the others"
            raise UsageError(
                f"--layers {layers}: {target.name} cannot be told so of layers of a sliding window; it {does}.\n"
                f"  Leave out --layers, or give --layers {fixed}."
            )
    return "full" if layers == "full" else "all"


def check_latents(target: Target, geometry: CacheGeometry | None) -> None:
    """Raise UsageError where a runtime can be told nothing of a model, since it has latent attention."""
    if (unknown := latents_unknown(target, geometry)) is not None:
        raise UsageError(f"--target {target.name}: {unknown}.\n  Leave out --target: kvprof's own cache stores it.")


def latents_unknown(target: Target, geometry: CacheGeometry | None) -> str | None:
    """Return why a runtime can be told nothing of a model with latent attention (MLA), or None where it can."""
    if target.name == "transformers" or geometry is None or not any(shape.is_latent for shape in geometry.planned):
        return None
    return f"the model has latent attention (MLA), and kvprof does not know how {target.name} stores a latent"


def sliding_remark(plan: BitPlan, target: Target) -> str | None:
    """Return that a runtime quantizes the sliding layers that a plan leaves alone, where it does; else None."""
    skipped = [] if plan.geometry is None else [plan.geometry.layers[layer] for layer in plan.reasons]
    if target.sliding != "quantized" or not any(shape.window for shape in skipped):
        return None
    return (
        f"{target.name} quantizes layers of a sliding window like the others: neither its KL nor its bytes are what "
        f"the plan says; `kvprof gradients --target {target.name}` scores them too"
    )


def _stored_bits(name: str) -> str:
    """Return the stored bits of a format by name, in words: `4.5`, `4 + 32/D`."""
    foreign = FOREIGN.get(name)
    if foreign is not None and foreign.block == 0:
        return f"{foreign.bits} + {foreign.side_bits}/D"
    return f"{float(format_named(name, 'value').stored_bits()):g}"


_LLAMA_CPP = (*(name for name in GGML if name != "q6_0"), FULL)
_FP8 = {"fp8_e4m3": ("fp8_e4m3", "fp8_e4m3"), "fp8_e5m2": ("fp8_e5m2", "fp8_e5m2")}
_NVFP4 = ("nvfp4", "nvfp4")
_AUTO = (FULL, FULL)
_TURBO = {
    "turboquant_k8v4": ("fp8_e4m3", "turbo_v4"),
    "turboquant_4bit_nc": ("turbo_k4", "turbo_v4"),
    "turboquant_k3v4_nc": ("turbo_k3", "turbo_v4"),
    "turboquant_3bit_nc": ("turbo_k3", "turbo_v3"),
}
_MLX = {name: (name, name) for name in MLX}
_VLLM = _FP8 | {"nvfp4": _NVFP4} | _TURBO
_SGLANG = {"auto": _AUTO} | _FP8 | {"fp4_e2m1": ("fp4_e2m1", "fp4_e2m1")}
_LMDEPLOY = {"0": _AUTO, "4": ("lmdeploy_int4", "lmdeploy_int4"), "8": ("lmdeploy_int8", "lmdeploy_int8")}
_TENSORRT = {"auto": _AUTO, "fp8": ("fp8_e4m3", "fp8_e4m3"), "nvfp4": _NVFP4}
_MODELOPT = {"FP8": ("fp8_e4m3", "fp8_e4m3"), "NVFP4": _NVFP4}


_ALL = (
    Target(
        name="transformers",
        grammar=None,
        window=USUAL_WINDOW,
        sliding="as told",
        artefact="a Python script that generates through PlanCache",
        since="transformers 5.23",
        checked="run by the tests, tokens compared with PlanCache's",
    ),
    Target(
        name="ik_llama.cpp",
        grammar=FirstLastRest((*GGML, FULL)),
        artefact="flags: -ctk T -ctk-first T,N -ctk-last T,M -ctv ...",
        since="April 2026 (pull requests 1599 and 1626)",
        checked="flags and precedence against common/common.cpp and src/llama.cpp; not run. A GGUF of the Llama family "
        "has a key's channels in another order than the checkpoint that is scored",
        full="f16",
    ),
    Target(
        name="llama.cpp",
        grammar=KeysAndValues(_LLAMA_CPP),
        artefact="flags: -ctk T -ctv T -fa on",
        since="a build whose -fa takes on, off or auto",
        checked="types against common/arg.cpp, and run (llama-cpp-python 0.3.36); quantizers bit for bit against "
        "gguf's. What comes before is left out: it turns keys and values by a Hadamard matrix (pull request 21038), "
        "and a GGUF of the Llama family has a key's channels in another order",
        full="f16",
    ),
    Target(
        name="vllm",
        grammar=SomeInFull(_VLLM, dict.fromkeys(_TURBO, 2)),
        sliding="as told",
        artefact="flags: --kv-cache-dtype X --kv-cache-dtype-skip-layers ...",
        since="the release that has --kv-cache-dtype-skip-layers (pull requests 33695, 38479)",
        checked="flags against vllm/config/cache.py, TurboQuant's bytes against its config.py; not run",
    ),
    Target(
        name="modelopt",
        grammar=EachLayer(_MODELOPT),
        sliding="as told",
        artefact="hf_quant_config.json, schema version 1",
        since="Model-Optimizer with pull request 2272; vLLM reads it with pull request 56116, open when checked",
        checked="fields against Model-Optimizer's own unit tests; not run",
    ),
    Target(
        name="sglang",
        grammar=OneOfAll(_SGLANG),
        artefact="flag: --kv-cache-dtype X",
        since="the release that has fp4_e2m1; for fp8 any",
        checked="values against docs/advanced_features/quantized_kv_cache.md; not run",
    ),
    Target(
        name="lmdeploy",
        grammar=OneOfAll(_LMDEPLOY),
        artefact="flag: --quant-policy N",
        since="0.4.0",
        checked="values and rounding against docs/en/quantization/kv_quant.md and fill_kv_cache.py; not run",
    ),
    Target(
        name="tensorrt-llm",
        grammar=OneOfAll(_TENSORRT),
        artefact="YAML: kv_cache_config: dtype: X",
        since="a release whose YAML has kv_cache_config (1.1 does)",
        checked="field against llm_args.py and the published examples; not run",
    ),
    Target(
        name="mlx-vlm",
        grammar=OneOfAll(_MLX),
        sliding="full",
        artefact="flags: --kv-bits B --kv-group-size G --quantized-kv-start 0",
        since="the release that has --quantized-kv-start",
        checked="flags against docs/cli/generate.md; not run",
    ),
    Target(
        name="mlx-lm",
        grammar=EachLayer(_MLX | {FULL: _AUTO}),
        sliding="full",
        artefact="a Python snippet that builds the prompt cache",
        since="the release that has QuantizedKVCache",
        checked="names and arguments against mlx_lm/models/cache.py, rounding against mlx's CPU source; not run",
    ),
    Target(
        name="exllamav3",
        grammar=EachTensor(tuple(EXL3)),
        artefact="a Python snippet with a cache layer of its own, and its bits as JSON",
        since="the release whose CacheLayer_quant takes cache_id",
        checked="constructor against exllamav3/cache/quant.py, rounding against q_cache_kernels.cuh; not run",
    ),
    Target(
        name="kvtuner",
        grammar=EachTensor(("int2g32", "int4g32", "int8g32")),
        window=Window(sink_tokens=0, recent_tokens=32),
        artefact="YAML: layer: {nbits_key: B, nbits_value: B}",
        since="any",
        checked="against the YAML that KVTuner published, both ways",
    ),
)

TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
"""Every runtime that a plan can be made for, by name."""
