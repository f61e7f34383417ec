"""Plans and caches made by hand, of a model that is a list of shapes."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from kvprof.records.document import ModelInfo
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import BitPlan, LayerPlan, Quantizer, TensorPlan, Window
from kvprof.runtime.cache import PlanCache
from kvprof.runtime.layers import PlannedLayer


def tensor_plan(name: str, axis: str, head_dim: int, recent_fraction: float = 0.0) -> TensorPlan:
    """Read a format's short name: int3g32, int2g64c, rot2, full."""
    settings: dict[str, object] = {"axis": axis, "recent_fraction": recent_fraction}
    if name == "full":
        settings |= {"bits": 16, "group_size": 32}
    elif name.startswith("rot"):
        settings |= {"scheme": "rotated", "bits": int(name[3:]), "group_size": head_dim, "axis": "token"}
    else:
        bits, group = name.removeprefix("int").removesuffix("c").split("g")
        settings |= {"bits": int(bits), "group_size": int(group), "clip": "mse" if name.endswith("c") else "none"}
    return TensorPlan.model_validate(settings)


def hand_plan(
    layers: Sequence[tuple[TensorPlan, TensorPlan]],
    kv_heads: int,
    head_dims: tuple[int, int],
    window: tuple[int, int] = (0, 0),
    dtype: str = "float32",
    quantizer: Quantizer | None = None,
    spans: Sequence[int | None] | None = None,
) -> BitPlan:
    """Return a plan for layers of one shape. window: (sink tokens, recent tokens); spans: of the layers that slide."""
    shapes = tuple(
        KVLayer(
            layer=layer,
            kind="full" if span is None else "sliding",
            kv_heads=kv_heads,
            key_head_dim=head_dims[0],
            value_head_dim=head_dims[1],
            window=span,
        )
        for layer, span in enumerate(spans or [None] * len(layers))
    )
    return BitPlan(
        model=ModelInfo(num_layers=len(layers)),
        quantizer=quantizer or Quantizer(),
        window=Window(sink_tokens=window[0], recent_tokens=window[1]),
        geometry=CacheGeometry.model_validate({"dtype": dtype, "layers": shapes}),
        layers=tuple(LayerPlan(layer=layer, key=key, value=value) for layer, (key, value) in enumerate(layers)),
    )


def hand_cache(plan: BitPlan) -> PlanCache:
    """Return the empty cache of a hand-made plan."""
    assert plan.geometry is not None
    return PlanCache(plan, [PlannedLayer(plan, entry, plan.geometry.layers[entry.layer]) for entry in plan.layers])


def tensors_within(root: object) -> list[torch.Tensor]:
    """Return every tensor that can be reached from an object, by following all that it holds; types are not entered."""
    seen: set[int] = set()
    found: list[torch.Tensor] = []
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type) or type(thing).__name__ in ("module", "function"):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        waiting.extend(gc.get_referents(thing))
    return found


def bytes_within(root: object) -> int:
    """Return the bytes of all storage behind the tensors that can be reached from an object, each counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_within(root)}
    return sum(storages.values())
