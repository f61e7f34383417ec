"""A model's module tree without its weights, on the meta device, and where it projects keys and values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging

from kvprof.errors import ModelError, UnknownLayout
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
from kvprof.models.layer_kinds import PROJECTING, layer_kinds, unplanned_latents
from kvprof.models.layouts import INCOMPLETE, Projection, find_projections
from kvprof.records.geometry import LayerKind

NORM_ON_KEYS = re.compile(r"^(k|key|qk|kv|kv_a)_?(layer_?norm|norm)$")
"""Names of the module that normalises keys after k_proj: k_norm, k_layernorm, key_layernorm, qk_norm; or the latent of
latent attention: kv_a_layernorm."""

CROSSING: tuple[LayerKind, str | None] = (
    "cross",
    "cross-attention layer: its keys and values are of an image or sound, not of the text",
)


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
