"""mlx-vlm: command-line flags, one choice for the whole cache.

    --kv-bits 4 --kv-group-size 64 --quantized-kv-start 0

Sources, of 0.7.10: `docs/cli/generate.md`; `mlx_vlm/generate/common.py` (maybe_quantize_kv_cache: every layer, and a
layer of a sliding window raises); `mlx_vlm/generate/ar.py` (_make_cache: the batch server leaves the last layer in 16
bits). `--kv-key-bits` and `--kv-value-bits` are of its other scheme, turboquant: of uniform integers keys and values
have the same bits.

A query reads its own token as stored, as in mlx-lm.
"""

from __future__ import annotations

from kvprof.allocate.constraints import OneOfAll
from kvprof.allocate.target import Target
from kvprof.records.external_formats import EXTERNAL, MLX
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact
from kvprof.targets.one_choice import written


def _refuses(geometry: CacheGeometry) -> str | None:
    slide = [shape for shape in geometry.layers if shape.window is not None]
    if not slide:
        return None
    return f"layer {slide[0].layer} has a {slide[0].window_text}, and mlx-vlm quantizes no model with such layers"


TARGET = Target(
    name="mlx-vlm",
    constraints=OneOfAll({name: (name, name) for name in MLX}),
    refuses=_refuses,
    artefact="flags: --kv-bits B --kv-group-size G --quantized-kv-start 0",
    since="the release that has --quantized-kv-start",
    checked="flags and layers against the parser and mlx_vlm/generate of 0.7.10; not run, its rounding is mlx-lm's",
)


def write(plan: BitPlan) -> Artefact:
    """Return the flags for a uniform plan; by itself it would leave the first 5,000 tokens alone."""

    def flags(word: str) -> str:
        form = EXTERNAL[word]
        return f"--kv-bits {form.bits} --kv-group-size {form.block} --quantized-kv-start 0\n"

    remark = (
        "mlx-vlm's batch server leaves the last layer in 16 bits: it holds more, and loses less, than the plan says"
    )
    return written(plan, TARGET, flags, ".args", lambda word: [remark])
