"""How a plan is put together: a format for each tensor, and all that a BitPlan says besides.

Reads the tensors to plan, their formats and whose they are; writes a BitPlan, its costs counted.
Does not know how the formats were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvprof import __version__
from kvprof.allocate.budget import CachedTensor, Limit, spent
from kvprof.records.document import ModelInfo
from kvprof.records.formats import TENSORS, Format
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import (
    BitPlan,
    Provenance,
    Quantizer,
    SkippedLayer,
    Solver,
    TensorPlan,
    Window,
    layer_plan,
)


def tensors_of(shapes: Mapping[int, KVLayer | None]) -> list[CachedTensor]:
    """Return the keys of every layer, then the values: where all else is equal, keys need the bits more."""
    return [CachedTensor(layer, name, shape) for name in TENSORS for layer, shape in shapes.items()]


def assemble(
    tensors: Sequence[CachedTensor],
    formats: Sequence[Format],
    *,
    model: ModelInfo,
    geometry: CacheGeometry | None,
    quantizer: Quantizer,
    window: Window,
    solver: Solver | None,
    provenance: Provenance,
    limit: Limit | None = None,
) -> BitPlan:
    """Return the plan that stores each tensor in its format; a TensorPlan brings its `recent_fraction`.

    The layers that the geometry skips go to `skipped`, with its reasons. limit: what was asked for.
    """
    entries = {form: TensorPlan(**form.model_dump()) for form in set(formats)}
    entry_of = {(tensor.layer, tensor.name): entries[form] for tensor, form in zip(tensors, formats, strict=True)}
    return BitPlan(
        kvprof_version=__version__,
        model=model,
        budget=spent(tensors, formats, geometry, limit),
        quantizer=quantizer,
        window=window,
        geometry=geometry,
        layers=tuple(
            layer_plan(layer, entry_of[layer, "key"], entry_of[layer, "value"], shape is not None and shape.is_latent)
            for layer, shape in sorted({tensor.layer: tensor.shape for tensor in tensors}.items())
        ),
        skipped=tuple(
            SkippedLayer(layer=layer.layer, reason=layer.skipped)
            for layer in (geometry.layers if geometry else ())
            if layer.skipped is not None
        ),
        solver=solver,
        provenance=provenance,
    )
