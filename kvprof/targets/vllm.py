"""vLLM: command-line flags, one quantized dtype and the layers that stay in 16 bits.

    --kv-cache-dtype fp8_e4m3 --kv-cache-dtype-skip-layers 0 1 28 29

Sources, of 0.33.0: `vllm/config/cache.py` (the dtypes), `vllm/model_executor/layers/attention/attention.py` (layers by
index, separated by blanks; a number that is no layer is passed over in silence), and of TurboQuant
`vllm/model_executor/layers/quantization/turboquant/config.py`: its dtypes and UltraQuant's leave two layers at either
end alone by themselves, which are written out all the same, but none of a model with recurrent layers too.
Of its 22 dtypes those are left out that MLA, one maker's chip or ROCm alone has (`fp8_inc`, `fp8_ds_mla`,
`nvfp4_ds_mla`, `octave_*`), and `fp8`, which is `fp8_e4m3`.

A query that decodes reads its own token as stored: `do_kv_cache_update` of each attention backend runs before its
`forward` (`vllm/v1/attention/backends/turboquant_attn.py` and others).
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, SomeInFull, pairs_of
from kvprof.allocate.target import Target
from kvprof.records.external_formats import TOKEN_HEAD
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, told

TURBOQUANT = {
    "turboquant_k8v4": ("fp8_e4m3", "turbo_v4"),
    "turboquant_4bit_nc": ("turbo_k4", "turbo_v4"),
    "turboquant_k3v4_nc": ("turbo_k3", "turbo_v4"),
    "turboquant_3bit_nc": ("turbo_k3", "turbo_v3"),
}
ULTRAQUANT = "ultraquant_4bit"
PAIRS = {
    "fp8_e4m3": ("fp8_e4m3", "fp8_e4m3"),
    "fp8_e5m2": ("fp8_e5m2", "fp8_e5m2"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "nvfp4_4over6": ("nvfp4_4over6", "nvfp4_4over6"),
    **{name: (name, name) for name in TOKEN_HEAD},
    ULTRAQUANT: ("ultraquant_k4", "ultraquant_v4"),
    **TURBOQUANT,
}
"""vLLM's word to the formats of keys and values."""

NEEDS = {
    "nvfp4": "Blackwell",
    "nvfp4_4over6": "Blackwell",
    ULTRAQUANT: "ROCm's gfx950, and reads queries in fp8_e4m3, which is not predicted",
}
"""What a word needs that not every GPU is."""

TARGET = Target(
    name="vllm",
    constraints=SomeInFull(PAIRS, dict.fromkeys((*TURBOQUANT, ULTRAQUANT), 2)),
    sliding="as told",
    artefact="flags: --kv-cache-dtype X --kv-cache-dtype-skip-layers ...",
    since="the release that has --kv-cache-dtype-skip-layers (pull requests 33695, 38479); int4_per_token_head and "
    "its like 0.33.0",
    checked="dtypes and layers against vllm/config/cache.py of 0.33.0, rounding against its Triton kernels and their "
    "references; its kernels need a GPU and were not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return vLLM's flags for a plan of one dtype, and 16 bits for any layers."""
    found = told(plan, TARGET)
    constraints = TARGET.for_model(plan.geometry).constraints
    assert isinstance(constraints, SomeInFull)
    pairs = pairs_of(found.assignment)
    full = {layer for layer, pair in pairs.items() if pair == (FULL, FULL)}
    if len(full) == len(pairs):
        return _unquantized(plan, found.remarks)
    word = constraints.word_of(found.assignment, plan.model.num_layers)
    skipped = sorted(full | _left_in_16_bits(plan))
    flags = f"--kv-cache-dtype {word}"
    if skipped:
        flags += " --kv-cache-dtype-skip-layers " + " ".join(map(str, skipped))
    remarks = [*found.remarks, *([f"{word} needs {NEEDS[word]}"] if word in NEEDS else [])]
    shared = [] if plan.geometry is None else [one.layer for one in plan.geometry.layers if one.kind == "shared"]
    if shared and skipped:
        layers = ", ".join(map(str, shared))
        remarks.append(
            f"layers {layers} read the cache of another layer: name each among the skipped ones too whose source is"
        )
    return Artefact(flags + "\n", ".args", tuple(remarks))


def _left_in_16_bits(plan: BitPlan) -> set[int]:
    """Return the layers with keys and values of their own that a plan leaves alone, all where that is not known.

    A layer that reads another's cache has to have that one's dtype.
    """
    layers = {entry.layer for entry in plan.skipped or ()}
    if plan.geometry is None:
        return layers
    return {layer for layer in layers if plan.geometry.layers[layer].has_projections}


def _unquantized(plan: BitPlan, remarks: tuple[str, ...]) -> Artefact:
    """Return the flag for 16 bits everywhere. `auto` is another thing: a checkpoint with an FP8 cache gets that."""
    dtype = None if plan.geometry is None else plan.geometry.dtype
    if dtype in ("float16", "bfloat16"):
        return Artefact(f"--kv-cache-dtype {dtype}\n", ".args", remarks)
    remark = (
        "auto is FP8 where the checkpoint brings an FP8 cache: write the dtype that vLLM computes in instead, float16 "
        "or bfloat16"
    )
    return Artefact("--kv-cache-dtype auto\n", ".args", (*remarks, remark))
