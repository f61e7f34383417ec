"""vLLM: command-line flags, one quantized dtype and the layers that stay in 16 bits.

    --kv-cache-dtype fp8_e4m3 --kv-cache-dtype-skip-layers 0 1 28 29

Sources: `vllm/config/cache.py` (the dtypes; layers by index, separated by blanks), and of TurboQuant
`vllm/model_executor/layers/quantization/turboquant/config.py`: its dtypes leave two layers at either end alone by
themselves, which are written out all the same.

A query that decodes reads its own token as stored: `do_kv_cache_update` of each attention backend runs before its
`forward` (0.33.0, `vllm/v1/attention/backends/turboquant_attn.py` and others).
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, SomeInFull, pairs_of
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, told

TURBOQUANT = {
    "turboquant_k8v4": ("fp8_e4m3", "turbo_v4"),
    "turboquant_4bit_nc": ("turbo_k4", "turbo_v4"),
    "turboquant_k3v4_nc": ("turbo_k3", "turbo_v4"),
    "turboquant_3bit_nc": ("turbo_k3", "turbo_v3"),
}
PAIRS = {
    "fp8_e4m3": ("fp8_e4m3", "fp8_e4m3"),
    "fp8_e5m2": ("fp8_e5m2", "fp8_e5m2"),
    "nvfp4": ("nvfp4", "nvfp4"),
    **TURBOQUANT,
}
"""vLLM's word to the formats of keys and values."""

TARGET = Target(
    name="vllm",
    constraints=SomeInFull(PAIRS, dict.fromkeys(TURBOQUANT, 2)),
    sliding="as told",
    artefact="flags: --kv-cache-dtype X --kv-cache-dtype-skip-layers ...",
    since="the release that has --kv-cache-dtype-skip-layers (pull requests 33695, 38479)",
    checked="flags against vllm/config/cache.py, TurboQuant's bytes against its config.py; not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return vLLM's flags for a plan of one dtype, and 16 bits for any layers."""
    found = told(plan, TARGET)
    constraints = TARGET.constraints
    assert isinstance(constraints, SomeInFull)
    pairs = pairs_of(found.assignment)
    full = {layer for layer, pair in pairs.items() if pair == (FULL, FULL)}
    if len(full) == len(pairs):
        return Artefact("--kv-cache-dtype auto\n", ".args", found.remarks)
    word = constraints.word_of(found.assignment, plan.model.num_layers)
    skipped = sorted(full | {entry.layer for entry in plan.skipped or ()})
    flags = f"--kv-cache-dtype {word}"
    if skipped:
        flags += " --kv-cache-dtype-skip-layers " + " ".join(map(str, skipped))
    return Artefact(flags + "\n", ".args", found.remarks)
