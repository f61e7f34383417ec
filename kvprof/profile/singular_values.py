"""Which singular values have the keys and values that a model caches of a text? Of each KV head of each layer.

Reads a model and the token ids of one sequence; returns float64 numbers. One forward, of which nothing is kept but
these: a layer's keys and values are reduced as they come. Does not know text, files, nor what the numbers are for.
Source: arXiv 2502.15075, whose figures show them layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvprof.errors import KvprofError, UnsupportedAttention
from kvprof.models.decoder import cache_argument
from kvprof.models.load import input_device, wider_dtype_advice
from kvprof.models.memory import memory_explained
from kvprof.profile.lm_head import Head
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import head_dim_of

SingularValues = dict[tuple[int, TensorName], NDArray[np.float64]]
"""(layer, tensor) to the values of each head, the largest first: (H, min(T, D))."""


def cached_singular_values(model: PreTrainedModel, geometry: CacheGeometry, ids: Sequence[int]) -> SingularValues:
    """Return the singular values of the (T, D) keys, and values, of each KV head of every scored layer.

    The keys are those that go into the cache: after rotary embedding and any norm, in the dtype that the model computes
    in. Of a sliding-window layer all T tokens count, also those that its window has left.
    model: in eval mode; left as it was found.
    Raises UnsupportedAttention for a model that does not hand its keys and values to a cache, KvprofError where they
    are not finite or the memory does not suffice.
    """
    device = input_device(model)
    cache = _Reducing(model, geometry)
    explained = memory_explained(
        f"out of memory on {device} with a sequence of {len(ids)} tokens.\n"
        "  Lower --sequence-length, or try --dtype float16; what is measured so far is kept."
    )
    try:
        with explained, torch.no_grad():
            ids_BT = torch.tensor([list(ids)], device=device)
            Head(model, input_ids=ids_BT, use_cache=True, **{cache_argument(model): cache})
    except ValueError as error:
        if not re.search(r"\b(past_key_values|cache)\b", str(error)):
            raise
        raise UnsupportedAttention(
            f"{type(model).__name__} takes no cache but one of its own, so kvprof cannot read what goes into it."
        ) from None
    for layer in geometry.scored:
        if (layer.layer, "key") not in cache.found:
            raise UnsupportedAttention(
                f"layer {layer.layer} of {type(model).__name__} keeps its keys and values in a way of its own, which "
                "kvprof cannot read: it hands none to transformers' cache."
            )
    return cache.found


class _Reducing(DynamicCache):  # type: ignore[misc]
    """A cache that keeps of each scored layer's keys and values the singular values alone.

    It serves a single forward, in which attention reads just what it hands over. States of recurrent layers, and what
    other layers cache, are kept as usual.
    """

    def __init__(self, model: PreTrainedModel, geometry: CacheGeometry) -> None:
        super().__init__(config=model.config)
        self.found: SingularValues = {}
        self._model = model
        self._shapes = {layer.layer: layer for layer in geometry.scored}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Reduce one layer's keys and values, (1, H, T, D) each, and hand them back."""
        shape = self._shapes.get(layer_idx)
        if shape is None:
            kept: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return kept
        for tensor, states in zip(TENSORS, (key_states, value_states), strict=True):
            found = singular_values(self._checked(states, shape, tensor))
            beyond = np.finfo(np.float64).max / np.sqrt(found.shape[1])  # what may have no Frobenius norm
            if found.max() >= beyond:
                raise KvprofError(
                    f"the {tensor}s of layer {layer_idx} reach {float(states.abs().max()):.3g}: their norm is beyond "
                    "float64.\n  Nothing can be said of such numbers: the weights are damaged."
                )
            self.found[layer_idx, tensor] = found
        return key_states, value_states

    def _checked(self, states_BHTD: Tensor, shape: KVLayer, tensor: TensorName) -> Tensor:
        """Return a sequence's (H, T, D); raise where it is not what the geometry says, or not finite."""
        if not states_BHTD.isfinite().all():
            dtype = str(self._model.dtype).removeprefix("torch.")
            advice = wider_dtype_advice(
                self._model, "the weights are damaged, or the text drives the model out of range"
            )
            raise KvprofError(f"the {tensor}s of layer {shape.layer} are not finite in {dtype}.\n  {advice}")
        heads, dims = shape.kv_heads, head_dim_of(shape, tensor)
        own = _without_copies(states_BHTD, heads)
        if own is None or own.shape[0] != 1 or own.shape[3] != dims:
            raise UnsupportedAttention(
                f"layer {shape.layer} of {type(self._model).__name__} caches {tensor}s of shape "
                f"{tuple(states_BHTD.shape)}, not (1, {heads}, T, {dims}): kvprof cannot tell its heads apart."
            )
        return own[0]


def _without_copies(states_BHTD: Tensor, heads: int) -> Tensor | None:
    """Return the KV heads of what is cached, (B, H, T, D), or None where they are not to be told.

    Falcon's grouped attention caches each of them once for every query head that reads it.
    """
    if states_BHTD.dim() != 4 or states_BHTD.shape[1] % heads:
        return None
    groups = states_BHTD.reshape(states_BHTD.shape[0], heads, -1, *states_BHTD.shape[2:])
    return groups[:, :, 0] if (groups == groups[:, :, :1]).all() else None


def singular_values(matrices_HTD: Tensor) -> NDArray[np.float64]:
    """Return the singular values of each (T, D) matrix, the largest first: (H, min(T, D)), float64.

    By Householder reflections (QR, then an SVD of the small factor), not by the Gram matrix: that squares the values,
    and those below 1e-8 of the largest drown. Infinite where a value is beyond float64, and only there.
    """
    if matrices_HTD.device.type == "mps":  # Apple's GPUs have no float64
        matrices_HTD = matrices_HTD.cpu()
    wide = matrices_HTD.double()
    largest_H11 = wide.abs().amax(dim=(1, 2), keepdim=True)
    scale_H11 = torch.where(largest_H11 > 0, largest_H11, 1)  # reflections square what they reflect
    wide = wide / scale_H11
    if wide.shape[1] > wide.shape[2]:
        wide = torch.linalg.qr(wide, mode="r").R  # (H, D, D)
    found: NDArray[np.float64] = (torch.linalg.svdvals(wide) * scale_H11[:, :, 0]).cpu().numpy()
    return found
