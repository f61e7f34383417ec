"""LMDeploy: one command-line flag for the whole cache.

    --quant-policy 8

Source: `docs/en/quantization/kv_quant.md`.

A query reads its own token as stored: `fill_kv_cache` comes before attention (0.18.0,
`lmdeploy/pytorch/backends/cuda/attention/default.py`).
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, OneOfAll
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact
from kvprof.targets.one_choice import written

TARGET = Target(
    name="lmdeploy",
    constraints=OneOfAll(
        {
            "0": (FULL, FULL),
            "4": ("lmdeploy_int4", "lmdeploy_int4"),
            "8": ("lmdeploy_int8", "lmdeploy_int8"),
        }
    ),
    artefact="flag: --quant-policy N",
    since="0.4.0",
    checked="values and rounding against docs/en/quantization/kv_quant.md and fill_kv_cache.py; not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return the flag for a uniform plan."""
    return written(plan, TARGET, lambda word: f"--quant-policy {word}\n", ".args")
