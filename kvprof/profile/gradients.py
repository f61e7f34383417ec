"""How much does the loss feel each layer's W_k and W_v? The norm of its gradient, on calibration text.

Reads a loaded model and calibration sequences; one forward and one backward serve all layers, and give every sequence
of a batch its own gradient. Does not know bits, nor rounding errors.
Source: arXiv 2506.08018, section 3 (KVmix: layers whose projections have the larger gradient get more bits).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvprof import __version__
from kvprof.calibration.sequences import IGNORED, Batch, CalibrationSet, batches
from kvprof.errors import NonFiniteGradient
from kvprof.models.inventory import take_inventory
from kvprof.models.layouts import Projection, choose_layout, cut_rows, find_projections
from kvprof.models.weights import Fingerprint, take_rows
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.scores import LayerScores, Scores, TensorScores

Norms = list[tuple[float, float]]
"""One sequence's gradient norms: (key, value) for each scored layer, ascending."""


def measure_gradients(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    batch_size: int = 1,
    model_id: str | None = None,
    done: dict[int, Norms] | None = None,
    finished: Callable[[dict[int, Norms]], None] = lambda norms: None,
) -> Scores:
    """Measure the mean over sequences of the L2 norm of dLoss/dW_k and dLoss/dW_v of every layer.

    model: in eval mode; left as it was found. Loss: the mean cross-entropy of each sequence over its own targets.
    done: norms of sequences measured before, by index; finished: called with each batch's norms as it is done.
    Returns Scores with gradient_norm and gradient_norm_stderr (0 for a single sequence).
    Raises NonFiniteGradient, with advice, where half precision overflows.
    """
    inventory = take_inventory(model.config, model_id)
    geometry = inventory.geometry
    measured = dict(done or {})
    todo = [index for index in range(len(calibration.sequences)) if index not in measured]
    for batch in batches(calibration.sequences, batch_size, todo):
        norms = sequence_gradient_norms(model, geometry, batch)
        finished(norms)
        measured |= norms
    per_sequence = torch.tensor([measured[index] for index in range(len(calibration.sequences))], dtype=torch.float64)
    mean, stderr = per_sequence.mean(0), _standard_error(per_sequence)
    return Scores(
        source="gradients",
        kvprof_version=__version__,
        model=inventory.model.model_copy(update={"fingerprint": fingerprint_of(model, geometry)}),
        calibration=calibration.info,
        geometry=geometry,
        layers=tuple(
            LayerScores(
                layer=layer.layer,
                key=TensorScores(gradient_norm=float(mean[row, 0]), gradient_norm_stderr=float(stderr[row, 0])),
                value=TensorScores(gradient_norm=float(mean[row, 1]), gradient_norm_stderr=float(stderr[row, 1])),
            )
            for row, layer in enumerate(geometry.scored)
        ),
    )


def sequence_gradient_norms(model: PreTrainedModel, geometry: CacheGeometry, batch: Batch) -> dict[int, Norms]:
    """Return the gradient norms of each sequence of one batch, from one forward and one backward.

    Nothing but the outputs of the K and V projections asks autograd for a gradient. As autograd brings dLoss/dOutput of
    one, its outer product with the projection's input is each sequence's dLoss/dW, and only the norm of that is kept.
    """
    device = model.get_input_embeddings().weight.device
    targets = (batch.labels[:, 1:] != IGNORED).sum(1)  # (B,)
    # transformers averages over the targets of the whole batch; each sequence counts its own.
    weight = (targets.sum() / targets).to(torch.float64)
    with _captured(model, geometry) as capture:
        arguments: dict[str, Any] = {
            "input_ids": batch.input_ids.to(device),
            "attention_mask": batch.attention_mask.to(device),
            "labels": batch.labels.to(device),
            "use_cache": False,
        }
        if batch.attention_mask[:, 0].min() == 0 and "position_ids" in inspect.signature(model.forward).parameters:
            positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)  # left padding moves no token
            arguments["position_ids"] = positions.to(device)
        model(**arguments).loss.backward()
    norms: dict[int, Norms] = {}
    for row, index in enumerate(batch.indices):
        norms[index] = []
        for layer in geometry.scored:
            pair = [float(capture.norms[layer.layer, tensor][row] * weight[row]) for tensor in TENSORS]
            for tensor, norm in zip(TENSORS, pair, strict=True):
                if not math.isfinite(norm):
                    raise NonFiniteGradient(_advice(model, layer.layer, tensor, norm))
            norms[index].append((pair[0], pair[1]))
    return norms


def fingerprint_of(model: PreTrainedModel, geometry: CacheGeometry) -> str | None:
    """Return the fingerprint of a loaded model; None where its weights are offloaded and cannot be read."""
    fingerprint = Fingerprint()
    for site in _sites(model, geometry):
        if site.module.weight.is_meta:
            return None
        fingerprint.add(site.rows(site.module.weight.detach(), "key", dim=1 if site.transposed else 0))
        other = site.value_module.weight.detach()
        if other.is_meta:
            return None
        fingerprint.add(site.rows(other, "value", dim=1 if site.transposed else 0))
    return fingerprint.text


@dataclass(frozen=True)
class _Site:
    """Where one layer's K and V are projected in a live model."""

    layer: KVLayer
    module: nn.Module
    value_module: nn.Module
    runs: dict[TensorName, tuple[tuple[int, int], ...]]
    transposed: bool


class _Capture:
    """Collects, during one backward, the squared norm of each sequence's dLoss/dW of every layer and tensor."""
