"""SGLang: one command-line flag for the whole cache.

    --kv-cache-dtype fp8_e4m3

Source: `docs/advanced_features/quantized_kv_cache.md`.

A query reads its own token as stored: attention backends call `set_kv_buffer` and then read the buffer (0.5.23,
`sglang/srt/layers/attention/triton_backend.py`).
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, OneOfAll
from kvprof.allocate.target import Target
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact
from kvprof.targets.one_choice import written

TARGET = Target(
    name="sglang",
    constraints=OneOfAll(
        {
            "auto": (FULL, FULL),
            "fp8_e4m3": ("fp8_e4m3", "fp8_e4m3"),
            "fp8_e5m2": ("fp8_e5m2", "fp8_e5m2"),
            "fp4_e2m1": ("fp4_e2m1", "fp4_e2m1"),
        }
    ),
    artefact="flag: --kv-cache-dtype X",
    since="the release that has fp4_e2m1; for fp8 any",
    checked="values against docs/advanced_features/quantized_kv_cache.md; not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return the flag for a uniform plan."""
    return written(plan, TARGET, lambda word: f"--kv-cache-dtype {word}\n", ".args")
