"""What each layer of a decoder caches, by transformers' own cache for its config, and why a plan leaves some alone.

Asks the class of each layer of that cache; no table of model names is kept. Does not know heads, nor widths.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import transformers
from torch import nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvprof.errors import KvprofError, ModelError, UnknownLayout, first_line
from kvprof.models.layouts import find_projections
from kvprof.records.geometry import LayerKind

LayerFound = tuple[LayerKind, int | None, str | None]
"""What a layer is, the tokens of its window, and why no plan covers it; null for the last two where there is none."""

PROJECTING = ("full", "sliding", "chunked", "hybrid", "latent")
"""The kinds of layer that project what they cache."""

KNOWN_LAYERS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
"""Layers of transformers' cache of which it is known which tokens they hold; by name, since no version has them all. A
class made of one of them may hold others."""

LATENT = "layer of latent attention (MLA)"


def config_of_layer(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """Return the config of one layer: the whole one, but where layers differ in what it says (Gemma 4)."""
    if not getattr(config, "is_heterogeneous", True):
        return config
    own = getattr(config, "per_layer_config", None)
    found: PretrainedConfig = config if own is None else own[layer]
    return found


def layer_kinds(config: PretrainedConfig) -> list[LayerFound]:
    """Return (kind, window, reason to skip) of each layer, as transformers' own cache for this config has it."""
    try:
        cache_layers = DynamicCache(config=config).layers
        runs = getattr(config, "decoder_layers", None) or config.num_hidden_layers
        if runs != config.num_hidden_layers:
            raise ModelError(
                f"{type(config).__name__} has {runs} decoder layers, and transformers makes a cache for "
                f"{config.num_hidden_layers}, those of its encoder: such a model cannot be run with a cache."
            )
        if 0 < len(cache_layers) < config.num_hidden_layers:
            raise ModelError(
                f"{type(config).__name__}: transformers {transformers.__version__} has a cache for {len(cache_layers)} "
                f"of its {config.num_hidden_layers} layers: the last read the keys and values of others.\n"
                "  kvprof plans such a model from transformers 5.23 on: upgrade it."
            )
        layer_types = getattr(config, "layer_types", None) or []
        kinds: list[LayerFound] = []
        for index in range(config.num_hidden_layers):
            layer_type = layer_types[index] if index < len(layer_types) else ""
            # A config without layer types makes no cache layers until the first token: all are plain attention.
            cache_layer = cache_layers[index] if index < len(cache_layers) else DynamicLayer()
            kinds.append(_kind(config, config_of_layer(config, index), cache_layer, layer_type))
    except KvprofError:
        raise
    except Exception as error:  # a config from anywhere
        name = type(config).__name__
        types = getattr(config, "layer_types", None) or []
        if "sliding_attention" in types and getattr(config, "sliding_window", None) is None:
            raise ModelError(
                f"{name} has sliding layers and no sliding_window: nobody knows how many tokens they see.\n"
                "  Write the number that the model was published with into its config.json."
            ) from None
        raise ModelError(f"{name} names no layers that transformers can cache: {first_line(error)}") from None
    return kinds


def _kind(config: PretrainedConfig, own: PretrainedConfig, cache_layer: Any, layer_type: str) -> LayerFound:
    """Return what `layer_kinds` does of one layer. own: its part of the config."""
    names = {base.__name__ for base in type(cache_layer).__mro__}
    recurrent = "LinearAttentionCacheLayerMixin" in names
    if "DummyLayer" in names:
        if layer_type in ("moe", "mlp"):
            return "none", None, "layer without attention"
        return "shared", None, "layer that reads another layer's keys and values"
    if recurrent and not isinstance(cache_layer, DynamicLayer):
        return "recurrent", None, "recurrent layer with a state of fixed size"
    is_latent = getattr(own, "kv_lora_rank", None) is not None
    known = KNOWN_LAYERS | ({"DynamicIndexedLayer"} if is_latent else set())
    if isinstance(cache_layer, DynamicLayer) and type(cache_layer).__name__ not in known:
        what = LATENT if is_latent else "layer"
        return "other", None, f"{what} with a cache of a kind unknown to kvprof ({type(cache_layer).__name__})"
    if isinstance(cache_layer, DynamicSlidingWindowLayer):
        window = int(cache_layer.sliding_window)
        if is_latent:
            return "latent", window, f"{LATENT} with a window of {window} tokens"
        limit = getattr(config, "max_position_embeddings", None) or 0
        if 0 < limit <= window and not recurrent:
            return "full", None, None  # the window never moves within the context that the model was made for
        kind: LayerKind = "chunked" if layer_type == "chunked_attention" else "sliding"
        return kind, window, None
    if recurrent:
        return "hybrid", None, None
    return ("latent" if is_latent else "full"), None, None


def unplanned_latents(
    decoder: Mapping[str, nn.Module], layers: Collection[int]
) -> dict[int, tuple[LayerKind, str | None]]:
    """Return which of the layers of latent attention are other than that, or are not planned: what, and why."""
    if not layers:
        return {}
    try:
        found = find_projections(decoder, layers=layers)
    except UnknownLayout:
        return dict.fromkeys(layers, ("other", f"{LATENT}, whose projection kvprof does not find"))
    unplanned: dict[int, tuple[LayerKind, str | None]] = {}
    for layer in layers:
        attention = decoder[found[layer].attention]
        if not found[layer].is_fused:  # a config may name a rank that its model does not use
            unplanned[layer] = "full", None
        elif not hasattr(attention, "expand_kv"):
            own: Any = attention
            latent = f"{own.kv_lora_rank + own.qk_rope_head_dim} numbers a token"
            unplanned[layer] = (
                "other",
                f"{LATENT}: transformers {transformers.__version__} caches the keys and values made of the latent, of "
                f"which nothing is planned; a runtime that caches the latent stores {latent}",
            )
        elif attention.qk_rope_head_dim == 0:
            unplanned[layer] = "latent", f"{LATENT} without a rotary part"
    return unplanned
