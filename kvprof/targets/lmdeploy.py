"""LMDeploy: one command-line flag for the whole cache.

    --quant-policy 8

Source, of 0.18.0: `lmdeploy/messages.py` (QuantPolicy), `lmdeploy/pytorch/engine/cache_engine/schema.py` (scales and
zero points have the model's dtype). The PyTorch engine has all of them; TurboMind no FP8.

A query reads its own token as stored: `fill_kv_cache` comes before attention
(`lmdeploy/pytorch/backends/cuda/attention/default.py`).
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, OneOfAll
from kvprof.allocate.target import Target
from kvprof.records.external_formats import LMDEPLOY, LMDEPLOY_TURBO
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact
from kvprof.targets.one_choice import written

TURBO_QUANT = "42"
PAIRS = {
    "0": (FULL, FULL),
    "16": ("fp8_e4m3", "fp8_e4m3"),
    "17": ("fp8_e5m2", "fp8_e5m2"),
    **{name.replace("lmdeploy_int", ""): (name, name) for name in LMDEPLOY},
    **{
        name.replace("lmdeploy_turbo_k4", TURBO_QUANT): (name, name.replace("_k4", "_v2"))
        for name, form in LMDEPLOY_TURBO.items()
        if form.bits == 4
    },
}
"""LMDeploy's number to the formats of keys and values; `8_bf16` is 8 where the model has bfloat16."""

TARGET = Target(
    name="lmdeploy",
    constraints=OneOfAll(PAIRS),
    artefact="flag: --quant-policy N",
    since="0.4.0; 16, 17 and 42 the PyTorch engine of 0.18.0",
    checked="numbers against QuantPolicy and the parser of --quant-policy, bytes and rounding against schema.py, "
    "fill_kv_cache.py and turbo_quant.py of 0.18.0; its kernels need a GPU and were not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return the flag for a uniform plan."""
    remark = "only LMDeploy's PyTorch engine is known to have such a cache: give --backend pytorch"
    return written(
        plan,
        TARGET,
        lambda word: f"--quant-policy {word.partition('_')[0]}\n",
        ".args",
        lambda word: [remark] if word.partition("_")[0] in ("16", "17", TURBO_QUANT) else [],
    )
