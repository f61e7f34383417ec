"""Is this the model that a file speaks of? Fingerprints of W_k and W_v, and the check of a file against a model.

Reads projections as `models.checkpoint.weights` streams them, out of a checkpoint or a live model. Writes nothing.
"""

from __future__ import annotations

import hashlib
from importlib import metadata

import numpy as np
import torch
from transformers import PreTrainedModel

from kvprof.models.checkpoint.weights import LayerWeights, stream_projections
from kvprof.models.config import load_config
from kvprof.models.decoder import text_config
from kvprof.models.execution.streaming import is_streamed
from kvprof.models.inventory import take_inventory
from kvprof.models.load import input_device
from kvprof.models.pinning import pin
from kvprof.models.quantized.settings import open_live
from kvprof.models.source import ModelSource
from kvprof.records.geometry import CacheGeometry
from kvprof.records.kinds import AnyFile
from kvprof.records.scores import MadeWith


class Fingerprint:
    """The identity of a model's keys and values: a hash over the signs of W_k and W_v, of each layer's own hash.

    A sign survives every cast between float dtypes, so a model has one fingerprint however it is loaded; it does not
    survive training, so a finetuned model has another. Layers can be hashed in several runs.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, weights: LayerWeights) -> None:
        """Take in the next layer, ascending."""
        self.add_digest(layer_digest(weights))

    def add_digest(self, digest: str) -> None:
        """Take in the next layer, ascending, by its `layer_digest`."""
        self._hash.update(bytes.fromhex(digest))

    @property
    def text(self) -> str:
        """`sha256:...` over what was taken in so far."""
        return "sha256:" + self._hash.hexdigest()


def layer_digest(weights: LayerWeights) -> str:
    """Return the sha256, in hex, over the shapes and signs of one layer's W_k and W_v."""
    digest = hashlib.sha256()
    for weight in (weights.key, weights.value):
        digest.update(repr(tuple(weight.shape)).encode())
        digest.update(np.packbits(torch.signbit(weight).cpu().numpy()).tobytes())
    return digest.hexdigest()


def live_fingerprint(model: PreTrainedModel, geometry: CacheGeometry) -> str | None:
    """Return a loaded model's fingerprint, its checkpoint's too; None where its weights are left elsewhere."""
    if is_streamed(model) or any(parameter.is_meta for parameter in model.parameters()):
        return None
    fingerprint = Fingerprint()
    for weights in stream_projections(open_live(model), geometry, model.config):
        fingerprint.add(weights)
    return fingerprint.text


def checkpoint_fingerprint(source: ModelSource, geometry: CacheGeometry) -> str:
    """Return the fingerprint of a model's checkpoint, its K and V projections streamed from the disk or the hub."""
    pinned = pin(source)
    config = load_config(pinned.source)
    fingerprint = Fingerprint()
    for weights in stream_projections(pinned.open(text_config(config)), geometry, config):
        fingerprint.add(weights)
    return fingerprint.text


def fingerprint_of(model: PreTrainedModel, geometry: CacheGeometry, source: ModelSource) -> str:
    """Return a loaded model's fingerprint, out of the checkpoint that it came from where its weights are not here."""
    return live_fingerprint(model, geometry) or checkpoint_fingerprint(source, geometry)


def made_with(model: PreTrainedModel | None = None) -> MadeWith:
    """Return what numbers follow from where a model computes; without a model, where the CPU reads its weights."""
    device = torch.device("cpu") if model is None else input_device(model)
    return MadeWith(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=None if model is None else str(model.dtype).removeprefix("torch."),
        versions={name: metadata.version(name) for name in ("torch", "transformers")},
    )


def check_fits(document: AnyFile, source: ModelSource) -> None:
    """Raise Mismatch, saying how they differ, when a file is for another model than this one."""
    geometry = take_inventory(load_config(source), source.id).geometry
    document.check_fits(geometry)  # shapes differ without a look at the weights
    if document.model is not None and document.model.fingerprint is not None:
        document.check_fits(geometry, checkpoint_fingerprint(source, geometry))
