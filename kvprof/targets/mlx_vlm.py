"""mlx-vlm: command-line flags, one choice for the whole cache.

    --kv-bits 4 --kv-group-size 64 --quantized-kv-start 0

Source: `docs/cli/generate.md`.

A query reads its own token as stored, as in mlx-lm.
"""

from __future__ import annotations

from kvprof.allocate.constraints import OneOfAll
from kvprof.allocate.target import Target
from kvprof.records.external_formats import EXTERNAL, MLX
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact
from kvprof.targets.one_choice import written

TARGET = Target(
    name="mlx-vlm",
    constraints=OneOfAll({name: (name, name) for name in MLX}),
    sliding="full",
    artefact="flags: --kv-bits B --kv-group-size G --quantized-kv-start 0",
    since="the release that has --quantized-kv-start",
    checked="flags against docs/cli/generate.md; not run",
)


def write(plan: BitPlan) -> Artefact:
    """Return the flags for a uniform plan; by itself it would leave the first 5,000 tokens alone."""

    def flags(word: str) -> str:
        form = EXTERNAL[word]
        return f"--kv-bits {form.bits} --kv-group-size {form.block} --quantized-kv-start 0\n"

    return written(plan, TARGET, flags, ".args")
