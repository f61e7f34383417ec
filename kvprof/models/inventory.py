"""Config -> cache geometry and red flags. No weights needed.

Reads a transformers config and the module tree that it describes (on the meta device: shapes without storage), so that
any architecture that transformers can build is covered and no table of model names is kept. Does not know where the
config came from.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import PretrainedConfig

from kvprof.errors import KvprofError, ModelError, UnknownLayout, first_line
from kvprof.models.decoder import query_heads, text_config
from kvprof.models.layer_kinds import PROJECTING, LayerFound, config_of_layer, layer_kinds
from kvprof.models.layouts import cut_rows
from kvprof.models.recurrent_states import recurrent_states
from kvprof.models.skeleton import Skeleton, build_skeleton
from kvprof.records.document import LARGEST_COUNT, ModelInfo
from kvprof.records.geometry import ELEMENT_BYTES, CacheGeometry, DType, KVLayer, LayerKind
from kvprof.records.inventory import Inventory, RedFlag

WIDEST = 2**22
"""Numbers that a layer may cache of a token: a hundred times those of the largest models."""

ASSUMED_DTYPE = torch.bfloat16
"""Where neither the config nor a checkpoint says: nobody publishes a language model's weights wider by now."""

WHY = {
    "key_norm": "keys are normalised after k_proj: the weight norm says nothing about the cache's scale",
    "key_bias": "k_proj has a bias: where it is large, low-bit keys collapse unless each channel has its own scale",
    "softcap": "attention logits are capped: key errors hurt less where logits are near the cap",
    "attention_sinks": "learned sinks take part of every softmax: scores on plain attention misjudge these layers",
}


def take_inventory(config: PretrainedConfig, model_id: str | None = None) -> Inventory:
    """Return what a model of this config caches, layer by layer, and its red flags.

    Raises ModelError for a config that describes no decoder, UnknownLayout for projections that kvprof cannot cut.
    """
    try:
        described = f"{type(config)}{config.to_json_string(use_diff=False)}"
    except Exception:  # a config from anywhere
        return _take_inventory(config, model_id)
    return _inventory_of(_Described(described, config), model_id)


@dataclass(frozen=True)
class _Described:
    """A config, told from others by all that it says: two of the same words describe one model."""

    words: str
    config: PretrainedConfig = field(compare=False)


@lru_cache(maxsize=8)  # a command asks several times, and a hybrid model is run on the meta device for the answer
def _inventory_of(described: _Described, model_id: str | None) -> Inventory:
    return _take_inventory(described.config, model_id)


def _take_inventory(config: PretrainedConfig, model_id: str | None) -> Inventory:
    name = type(config).__name__
    skeleton = build_skeleton(config)
    states = recurrent_states(skeleton.modules[""], skeleton.config)
    try:
        layers = tuple(
            _describe(skeleton, index, kind, window, reason).model_copy(update={"state": states.get(index)})
            for index, (kind, window, reason) in enumerate(_kinds_of(skeleton))
        )
        if not layers:
            raise ModelError(f"{name} describes a model without layers.")
        limit = position_limit(config)
        positions = limit if limit is not None and 0 < limit <= LARGEST_COUNT else None
        geometry = CacheGeometry(dtype=_dtype(config), layers=layers, positions=positions)
    except KvprofError:
        raise
    except ValidationError as error:
        wrong = error.errors()[0]
        what = wrong["msg"].removeprefix("Value error, ")
        if wrong["loc"]:
            what = f"{wrong['loc'][-1]} is {wrong['input']!r:.60}"
        raise ModelError(f"{name} describes a cache that cannot be: {what}.") from None
    except Exception as error:  # a config from anywhere
        raise ModelError(f"{name} describes a cache that cannot be: {first_line(error)}.") from None
    return Inventory(
        model=ModelInfo(id=model_id, architecture=_architecture(config, skeleton), num_layers=len(layers)),
        geometry=geometry,
        red_flags=_red_flags(skeleton, geometry),
        dtype_assumed=own_dtype(config) is None,
        key_norm_offset=_key_norm_offset(skeleton, geometry),
    )


def _architecture(config: PretrainedConfig, skeleton: Skeleton) -> str:
    """Return the model class that a config names, else the one that transformers takes."""
    named = getattr(config, "architectures", None) or [skeleton.architecture]
    if not isinstance(named, list | tuple) or not isinstance(named[0], str):
        raise ModelError(f"{type(config).__name__}: architectures is {named!r:.60}, no list of names.")
    return named[0]


def position_limit(config: PretrainedConfig) -> int | None:
    """Return how many positions a model was made for; None where its config sets no limit."""
    text = text_config(config)
    found = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]  # the latter: MPT
    return next((int(limit) for limit in found if limit is not None), None)


def _kinds_of(skeleton: Skeleton) -> list[LayerFound]:
    """Return (kind, window, reason to skip) of each layer, those named that do not attend to the text."""
    found = []
    for layer, (kind, window, reason) in enumerate(layer_kinds(skeleton.config)):
        if layer in skeleton.left_alone:
            kind, reason = skeleton.left_alone[layer]
            window = window if kind in ("latent", "full") else None
            kind = "sliding" if kind == "full" and window is not None else kind
        found.append((kind, window, reason))
    return found


def _describe(skeleton: Skeleton, index: int, kind: LayerKind, window: int | None, reason: str | None) -> KVLayer:
    """Measure one layer's KV heads and head dimensions on its projections."""
    if kind == "latent":
        attention: Any = skeleton.attention(index)
        indexer = getattr(attention, "indexer", None)
        latent = KVLayer(
            layer=index,
            kind=kind,
            kv_heads=1,
            key_head_dim=attention.kv_lora_rank,
            value_head_dim=attention.qk_rope_head_dim,
            window=window,
            skipped=reason,
            indexer_width=0 if indexer is None else indexer.head_dim,
        )
        _check_width(latent)
        return latent
    if kind not in PROJECTING:
        return KVLayer(layer=index, kind=kind, kv_heads=0, key_head_dim=0, value_head_dim=0, skipped=reason)
    if index not in skeleton.projections:
        raise UnknownLayout(
            f"layer {index} has attention of kind {kind!r}, but no projection of K and V was found in it."
        )
    projection, config = skeleton.projections[index], config_of_layer(skeleton.config, index)
    head_dim = (
        getattr(skeleton.attention(index), "head_dim", None)
        or getattr(config, "head_dim", None)
        or config.hidden_size // query_heads(config)
    )
    if projection.is_fused:
        kv_heads, value_head_dim = _fused_kv_heads(config), head_dim
    else:
        key_rows, value_rows = (_rows(skeleton, name) for name in (projection.key, projection.value))
        kv_heads = key_rows // head_dim
        heads = query_heads(config) if hasattr(skeleton.attention(index), "num_key_value_groups") else 0
        if kv_heads and heads % kv_heads:
            raise ModelError(f"layer {index} has {heads} query heads, which {kv_heads} KV heads cannot share evenly.")
        if kv_heads == 0 or key_rows % head_dim or value_rows % kv_heads:
            raise UnknownLayout(
                f"layer {index}: {projection.key} has {key_rows} rows and {projection.value} {value_rows}, "
                f"which are no whole heads of {head_dim}."
            )
        value_head_dim = value_rows // kv_heads
    layer = KVLayer(
        layer=index,
        kind=kind,
        kv_heads=kv_heads,
        key_head_dim=head_dim,
        value_head_dim=value_head_dim,
        window=window,
        skipped=reason,
        values_of_key_projection=projection.value == projection.key and not projection.is_fused,
        block_of=skeleton.first_of_block(index),
    )
    _check_width(layer)
    if projection.is_fused:
        cut_rows(projection.layout, layer, skeleton.query_heads)  # raises where the heads do not fit the matrix
    return layer


def _check_width(layer: KVLayer) -> None:
    """Raise ModelError for a layer that would cache more than any model does."""
    if (widest := max(layer.key_width, layer.value_width, layer.indexer_width)) > WIDEST:
        raise ModelError(
            f"layer {layer.layer} would cache {widest} numbers a token ({layer.kv_heads} heads of "
            f"{layer.key_head_dim}); no model has more than {WIDEST}."
        )


def _fused_kv_heads(config: PretrainedConfig) -> int:
    """Return the KV heads that a config with fused projections promises."""
    heads = query_heads(config)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    if getattr(config, "new_decoder_architecture", True):  # Falcon's plain layout ignores its num_kv_heads
        for holder in (config, getattr(config, "attn_config", None)):
            for name in ("num_key_value_heads", "num_kv_heads", "kv_n_heads"):
                if (found := getattr(holder, name, None)) is not None:
                    if type(found) is not int:
                        raise ModelError(f"{type(config).__name__}: {name} is {found!r:.60}, no number of heads.")
                    return found
    return heads


def _rows(skeleton: Skeleton, name: str) -> int:
    weight = getattr(skeleton.modules[name], "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise UnknownLayout(f"{name} is no plain matrix, but a {type(skeleton.modules[name]).__name__}.")
    return int(weight.shape[0])


def _red_flags(skeleton: Skeleton, geometry: CacheGeometry) -> tuple[RedFlag, ...]:
    raised: dict[str, list[int]] = {name: [] for name in WHY}
    softcap = any(
        getattr(skeleton.config, name, None) for name in ("attn_logit_softcapping", "attn_logit_cap", "attn_softcap")
    )
    for layer in geometry.scored:
        projection = skeleton.projections[layer.layer]
        attention = skeleton.attention(layer.layer)
        if skeleton.key_norm(layer.layer) is not None:
            raised["key_norm"].append(layer.layer)
        if getattr(skeleton.modules[projection.key], "bias", None) is not None:
            raised["key_bias"].append(layer.layer)
        if softcap:
            raised["softcap"].append(layer.layer)
        if any("sink" in name for name, _ in attention.named_parameters(recurse=False)):
            raised["attention_sinks"].append(layer.layer)
    return tuple(
        RedFlag(name=name, layers=tuple(layers), why=_why(name, layers, geometry))
        for name, layers in raised.items()
        if layers
    )


def _why(name: str, layers: Sequence[int], geometry: CacheGeometry) -> str:
    """Return what a red flag means in some layers: latents have a word of their own."""
    if name == "key_norm" and all(geometry.layers[layer].is_latent for layer in layers):
        return "latents are normalised after their projection: the weight norm says nothing about the cache's scale"
    return WHY[name]


def _key_norm_offset(skeleton: Skeleton, geometry: CacheGeometry) -> float | None:
    """Ask the norm itself what gain a stored weight of zero means: 0 for most, 1 for Gemma's."""
    for layer in geometry.scored:
        found = skeleton.key_norm(layer.layer)
        if found is None or not (parameters := list(found[1].parameters())):
            continue
        norm = copy.deepcopy(found[1]).to_empty(device="cpu").float()
        for parameter in norm.parameters():
            nn.init.zeros_(parameter)
        shape = parameters[0].shape
        probe = torch.ones(shape).flatten()
        probe[1::2] = -1  # mean 0, root mean square 1: what comes out is the gain
        try:
            with torch.no_grad():
                return round(float(norm(probe.reshape(shape)).abs().mean()), 3)
        except Exception:  # a module of this name that is no norm of one tensor
            return None
    return None


def own_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """Return the dtype that a config, or the text decoder's in it, names; None where it names none that can compute."""
    for part in (config, text_config(config)):
        name = str(getattr(part, "dtype", None)).removeprefix("torch.")
        if name in ELEMENT_BYTES:
            found: torch.dtype = getattr(torch, name)
            return found
    return None


def _dtype(config: PretrainedConfig) -> DType:
    return str(own_dtype(config) or ASSUMED_DTYPE).removeprefix("torch.")  # type: ignore[return-value]
