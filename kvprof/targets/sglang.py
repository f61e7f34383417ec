"""SGLang: one command-line flag for the whole cache.

    --kv-cache-dtype fp8_e4m3

Sources, of 0.5.23: `sglang/srt/arg_groups/fields/model.py` (the choices), `sglang/srt/mem_cache/kv_cache_dtype.py`
(what each stands for), `sglang/srt/arg_groups/kv_cache_hook.py` (which GPU each needs).

A query reads its own token as stored: attention backends call `set_kv_buffer` and then read the buffer
(`sglang/srt/layers/attention/triton_backend.py`).
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, OneOfAll
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact
from kvprof.targets.one_choice import UNQUANTIZED, written

NEEDS = {
    "nvfp4": "a Blackwell GPU (SM100 or SM120)",
    "mxfp8": "a Blackwell GPU and the FA4 attention backend",
    "fp4_mx_block16": "CUDA 12.8 and PyTorch 2.8",
}
"""What a word needs that not every machine has."""

TARGET = Target(
    name="sglang",
    constraints=OneOfAll(
        {
            UNQUANTIZED: (FULL, FULL),
            "fp8_e4m3": ("fp8_e4m3", "fp8_e4m3"),
            "fp8_e5m2": ("fp8_e5m2", "fp8_e5m2"),
            "mxfp8": ("mxfp8", "mxfp8"),
            "nvfp4": ("nvfp4", "nvfp4"),
            "fp4_mx_block16": ("fp4_mx_block16", "fp4_mx_block16"),
        }
    ),
    artefact="flag: --kv-cache-dtype X",
    since="0.5.23, which renamed fp4_e2m1; for fp8 any",
    checked="choices against the parser's of 0.5.23, rounding against kvfp4_tensor.py and mxfp8_quant_store_kv.py; its "
    "kernels need a GPU and were not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return the flag for a uniform plan."""
    dtype = None if plan.geometry is None else plan.geometry.dtype
    unquantized = "bfloat16" if dtype == "bfloat16" else "auto"

    def flag(word: str) -> str:
        return f"--kv-cache-dtype {unquantized if word == UNQUANTIZED else word}\n"

    def remarks(word: str) -> list[str]:
        if word == UNQUANTIZED and unquantized == "auto":
            return ["auto is FP8 where the checkpoint brings an FP8 cache: SGLang has no other word for float16"]
        return [f"{word} needs {NEEDS[word]}"] if word in NEEDS else []

    return written(plan, TARGET, flag, ".args", remarks)
