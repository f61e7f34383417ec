"""Config -> cache geometry and red flags. No weights needed.

Reads a transformers config and the module tree that it describes (on the meta device: shapes without storage), so that
any architecture that transformers can build is covered and no table of model names is kept. Does not know where the
config came from.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging

from kvprof.errors import KvprofError, ModelError, UnknownLayout, first_line
from kvprof.models.decoder import (
    build_on_meta,
    cross_attention_layers,
    decoder_modules,
    layers_without_values,
    other_memory,
    own_cache,
    query_heads,
    takes_cache,
    text_config,
)
from kvprof.models.layer_kinds import PROJECTING, LayerFound, config_of_layer, layer_kinds, unplanned_latents
from kvprof.models.layouts import INCOMPLETE, Projection, cut_rows, find_projections
from kvprof.models.recurrent_states import recurrent_states
from kvprof.records.document import LARGEST_COUNT, ModelInfo
from kvprof.records.geometry import ELEMENT_BYTES, CacheGeometry, DType, KVLayer, LayerKind
from kvprof.records.inventory import Inventory, RedFlag

NORM_ON_KEYS = re.compile(r"^(k|key|qk|kv|kv_a)_?(layer_?norm|norm)$")
"""Names of the module that normalises keys after k_proj: k_norm, k_layernorm, key_layernorm, qk_norm; or the latent of
latent attention: kv_a_layernorm."""

CROSSING: tuple[LayerKind, str | None] = (
    "cross",
    "cross-attention layer: its keys and values are of an image or sound, not of the text",
)

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


@dataclass(frozen=True)
class Skeleton:
    """A model's module tree without its weights, and what it says of every attention layer."""

    config: PretrainedConfig
    """The text decoder's config, also of a multimodal model."""
    modules: dict[str, nn.Module]
    projections: dict[int, Projection]
    architecture: str
    """The class of the model; of its text decoder, where its wrapper cannot be built here."""
    left_alone: Mapping[int, tuple[LayerKind, str | None]] = field(default_factory=dict)
    """The layers that are other than the config says, as their modules show: what they are, and why no plan covers
    them; null where one does."""

    @property
    def query_heads(self) -> int:
        """Query heads of a layer."""
        return query_heads(self.config)

    def attention(self, layer: int) -> nn.Module:
        """Return the attention module of a layer."""
        return self.modules[self.projections[layer].attention]

    def first_of_block(self, layer: int) -> int | None:
        """Return the first layer with the weights of a later one; None where the layer's weights are its own."""
        weight = getattr(self.modules[self.projections[layer].key], "weight", None)
        for other, projection in self.projections.items():
            if getattr(self.modules[projection.key], "weight", None) is weight:
                return other if other < layer and weight is not None else None
        return None

    def key_norm(self, layer: int) -> tuple[str, nn.Module] | None:
        """Return the module that normalises a layer's keys after k_proj, with its name in the attention module."""
        return key_norm_of(self.attention(layer))


def key_norm_of(attention: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the module that normalises keys after k_proj, with its name in the attention module; None without one."""
    for name, module in attention.named_children():
        if NORM_ON_KEYS.match(name) and not isinstance(module, nn.Identity):
            return name, module
    return None


def build_skeleton(config: PretrainedConfig) -> Skeleton:
    """Build the module tree that a config describes, on the meta device; raises ModelError where it cannot be built."""
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} describes an encoder-decoder; kvprof measures decoder-only language models.")
    text = text_config(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the skeleton is thrown away: its warnings concern nobody
    try:
        model = build_on_meta(config)
    finally:
        logging.set_verbosity(verbosity)
    architecture = type(model).__name__
    if (cache := own_cache(model)) is not None:
        raise ModelError(
            f"{architecture} brings a cache class of its own, {cache}, and keeps its keys and values there in a way "
            "that kvprof does not know.\n  Nothing of such a model can be measured, planned or stored."
        )
    if not takes_cache(model):
        raise ModelError(
            f"{architecture} keeps no cache of keys and values: each token reads the whole text anew.\n"
            "  Nothing of such a model can be measured, planned or stored."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    decoder = decoder_modules(model)
    left_alone = dict.fromkeys(cross_attention_layers(decoder), CROSSING)
    kinds = {layer: kind for layer, (kind, _, _) in enumerate(layer_kinds(text)) if kind in PROJECTING}
    attending = kinds.keys() - left_alone.keys()
    latent = {layer for layer in attending if kinds[layer] == "latent"}
    unplanned = unplanned_latents(decoder, latent)
    left_alone |= unplanned
    attending -= {layer for layer, (kind, _) in unplanned.items() if kind == "other"}
    if not attending:
        return Skeleton(text, modules, {}, architecture, left_alone)
    try:
        projections = find_projections(decoder, layers=attending, keys_alone=layers_without_values(decoder))
    except UnknownLayout as error:
        if any(getattr(module, "is_causal", True) is False for module in decoder.values()):
            raise ModelError(f"{name} describes an encoder: its attention sees the tokens to come.") from None
        if (kept := other_memory(model)) is not None:
            raise ModelError(
                f"{architecture} keeps no keys and values of the tokens before, but a `{kept}`.\n"
                "  Nothing of such a model can be measured, planned or stored."
            ) from None
        if (blocks := _repeated_blocks(decoder)) is not None:
            raise ModelError(
                f"{architecture} runs stacks of {blocks} blocks several times a token, as {len(layer_kinds(text))} "
                "layers of its cache, and kvprof does not know which layer is which block's.\n"
                "  Nothing of such a model can be measured, planned or stored."
            ) from None
        said = str(error).replace(INCOMPLETE, f"transformers {transformers.__version__} has no other word on them.")
        raise UnknownLayout(said) from None
    return Skeleton(text, modules, projections, architecture, left_alone)


def _repeated_blocks(decoder: Mapping[str, nn.Module]) -> int | None:
    """Return how many blocks there are of which each attends, where a model has no others; else None."""
    try:
        attending = len(find_projections(decoder))
    except UnknownLayout:
        return None
    largest = max((len(module) for module in decoder.values() if isinstance(module, nn.ModuleList)), default=0)
    return attending if attending == largest else None


def take_inventory(config: PretrainedConfig, model_id: str | None = None) -> Inventory:
    """Return what a model of this config caches, layer by layer, and its red flags.

    Raises ModelError for a config that describes no decoder, UnknownLayout for projections that kvprof cannot cut.
    """
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
