"""What is benchmarked: a real model, or a random one of a published shape.

Reads a config; loads or makes the model when it is asked for. Does not know what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kvprof.errors import Mismatch
from kvprof.models.config import DTYPES, load_config
from kvprof.models.decoder import text_config
from kvprof.models.identity import checkpoint_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model
from kvprof.models.shapes import random_model, shape_config
from kvprof.models.source import ModelSource
from kvprof.records.document import ModelInfo
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan


@dataclass(frozen=True)
class Subject:
    """A model to benchmark, not loaded yet.

    whole: the geometry of all of a shape's layers, where only the first are kept. make: loads or makes the model in a
    dtype on a device. fingerprint: asks the checkpoint for it; None of random weights: any plan of the shape fits them.
    """

    info: ModelInfo
    config: PretrainedConfig
    geometry: CacheGeometry
    whole: CacheGeometry
    is_random: bool
    make: Callable[[str, torch.device], PreTrainedModel]
    fingerprint: Callable[[], str | None]

    @property
    def text_config(self) -> PretrainedConfig:
        """The decoder's config, also of a multimodal model."""
        return text_config(self.config)

    def fitted(self, plan: BitPlan) -> BitPlan:
        """Return a plan as this model obeys it; raises Mismatch for one of another model.

        Of a shape's first layers, they have what the plan of the whole shape gives them. Random weights are nobody's: a
        plan's fingerprint is left out there.
        """
        if not self.is_random:
            plan.check_fits(self.geometry)  # shapes differ without a look at the weights
            if plan.model.fingerprint is not None:
                plan.check_fits(self.geometry, self.fingerprint())
            return plan
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": None})})
        if plan.model.num_layers == self.geometry.num_layers:
            plan.check_fits(self.geometry)
            return plan
        try:
            plan.check_fits(self.whole)
        except Mismatch as error:
            if self.geometry.num_layers == self.whole.num_layers:
                raise
            raise Mismatch(f"{error}\n  It may be a plan of the whole shape, or of the layers that are kept.") from None
        kept = self.geometry.num_layers
        return plan.model_copy(
            update={
                "model": plan.model.model_copy(update={"num_layers": kept}),
                "geometry": self.geometry,
                "layers": tuple(entry for entry in plan.layers if entry.layer < kept),
                "skipped": tuple(entry for entry in plan.skipped or () if entry.layer < kept),
                "budget": None,
            }
        )


def real_subject(source: ModelSource) -> Subject:
    """Return a model that was found, as something to benchmark."""
    config = load_config(source)
    inventory = take_inventory(config, source.id)
    geometry = inventory.geometry
    return Subject(
        inventory.model,
        config,
        geometry,
        geometry,
        is_random=False,
        make=lambda dtype, device: load_model(source, dtype, str(device)),
        fingerprint=lambda: checkpoint_fingerprint(source, geometry),
    )


def random_subject(shape: str, layers: int | None = None, seed: int = 0) -> Subject:
    """Return a random model of a named shape, of its first layers alone where that is asked for; raises UsageError."""
    config = shape_config(shape, layers)
    inventory = take_inventory(config, shape)
    return Subject(
        inventory.model,
        config,
        inventory.geometry,
        take_inventory(shape_config(shape), shape).geometry,
        is_random=True,
        make=lambda dtype, device: random_model(config, DTYPES[dtype], device, seed),
        fingerprint=lambda: None,
    )
