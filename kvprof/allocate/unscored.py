"""A plan of one format for all keys and one for all values, of a cache that nothing has been scored of.

Reads a geometry and two names of formats; writes a BitPlan. Knows no scores: `methods.uniform` predicts from them.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvprof.allocate.assemble import assemble, tensors_of
from kvprof.errors import UsageError
from kvprof.records.document import ModelInfo
from kvprof.records.formats import TENSORS, TensorName, format_named
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import USUAL_WINDOW, BitPlan, Provenance, Quantizer, Solver, Window, covered_geometry


def uniform_plan(
    formats: Mapping[TensorName, tuple[str, ...]],
    model: ModelInfo,
    geometry: CacheGeometry,
    *,
    window: Window = USUAL_WINDOW,
    command: str | None = None,
) -> BitPlan:
    """Return the plan that stores every planned layer's keys in one format and its values in another.

    formats: as `records.formats.parse_formats` reads them, one for each tensor.
    Raises UsageError where a tensor has none or several, or heads of this dimension cannot have it.
    """
    for name in TENSORS:
        if len(formats[name]) != 1:
            found = ", ".join(formats[name]) or "none"
            raise UsageError(f"a uniform plan has one format for the {name}s, not {found}: key:int4g64,value:int2g64.")
    geometry = covered_geometry(geometry, "all", window)
    if not geometry.planned:
        raise UsageError(f"{model.id or 'the model'} has no layer that a plan covers.")
    tensors = tensors_of({layer.layer: layer for layer in geometry.planned})
    return assemble(
        tensors,
        [format_named(formats[tensor.name][0], tensor.stored_as, tensor.head_dim) for tensor in tensors],
        model=model,
        geometry=geometry,
        quantizer=Quantizer(),
        window=window,
        solver=Solver(method="uniform"),
        provenance=Provenance(command=command),
    )
