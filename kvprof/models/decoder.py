"""The text decoder of a model, alone or in a wrapper: the config that describes it, the class to load, the module.

Asks a config and a module tree, through every auto class that transformers has for decoders. Does not know weights, nor
how keys and values are projected.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Cache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin

from kvprof.errors import ModelError, first_line, is_out_of_memory
from kvprof.models.own_code import is_own_class
from kvprof.models.quiet import quiet

_ALONE = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
_WRAPPED = (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
"""Where transformers keeps its decoders, in the order that is asked: of a wrapper, what is the text decoder alone may
not take the wrapper's checkpoint."""

_OWN = (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForImageTextToText)
"""Whose names an `auto_map` may have."""


_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)$")
_IN_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_ATTENTION = re.compile(r"att(n|ention)($|_?block$)")
_CROSS = re.compile(r"cross")
_MORE = re.compile(r"pixel|image|video|audio|feature|patches")
"""Names that forwards give to what they take beside text."""
_CACHES = frozenset({"cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states"})
"""What forwards call that which is kept of the tokens before."""


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the text decoder: the config itself, or one within it. Raises ModelError for several."""
    try:
        found: PretrainedConfig = config.get_text_config(decoder=True)
    except (ValueError, AttributeError) as error:  # of a wrapper that lacks a part
        raise ModelError(f"{type(config).__name__} names no text decoder: {first_line(error)}") from None
    return found


def loading_class(config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """Return the class that loads a model of this config, and the part of the config that it takes.

    The class is the one that the config names among those that transformers has for it, else the wrapper's. Of a model
    that only generates (Qwen-Omni, which speaks) it is the part with the text decoder in it: that reads text.
    Raises ModelError for a config that transformers knows no decoder for.
    """
    found = _class_and_config(config)
    if found is None:
        raise ModelError(f"{type(config).__name__} describes no decoder language model that transformers knows.")
    return found


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model that a config describes, without storage; where its wrapper cannot be built, the decoder alone.

    Raises ModelError where neither can.
    """
    found = _class_and_config(config)
    text = text_config(config)
    if found is None and text is not config:
        found = _class_and_config(text)
    if found is None:
        raise ModelError(f"{type(config).__name__} describes no decoder language model that transformers knows.")
    try:
        return _built(*found)
    except Exception as error:  # a config from anywhere, read by the model's own code
        alone = _class_and_config(text) if text is not config else None
        if alone is not None:  # parts of a wrapper may need packages that are not here
            try:
                return _built(*alone)
            except Exception:
                pass
        raise ModelError(
            f"{type(config).__name__} describes no decoder language model that transformers can build: "
            f"{first_line(error)}"
        ) from None


def _built(kind: Any, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        if kind in _OWN:
            model: PreTrainedModel = kind.from_config(config, trust_remote_code=True)  # its config ran already
        else:
            model = kind._from_config(config)
    return model


def _class_and_config(config: PretrainedConfig) -> tuple[Any, PretrainedConfig] | None:
    """Do as `loading_class` does; None where there is no class."""
    if is_own_class(config):
        named = getattr(config, "auto_map", None) or {}
        own = next((auto for auto in _OWN if auto.__name__ in named), None)
        if own is not None:
            return own, config
    text = text_config(config)
    kinds = list(_known_classes(config, _ALONE if text is config else _WRAPPED))
    named = getattr(config, "architectures", None)  # of a config from anywhere
    named_class = named[0] if isinstance(named, list | tuple) and named else None
    for kind in sorted(kinds, key=lambda kind: kind.__name__ != named_class):  # stable: else in the order asked
        if not _has_forward(kind):
            continue
        if text is not config and getattr(kind, "config_class", None) is type(text):
            return kind, text
        return kind, config
    if kinds:
        for part in _parts(config):
            if part is text or text_config(part) is text:
                return _class_and_config(part)
    return None


def _known_classes(config: PretrainedConfig, mappings: tuple[Any, ...]) -> Iterator[type[PreTrainedModel]]:
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            yield from found if isinstance(found, tuple) else (found,)


def _has_forward(kind: type[PreTrainedModel]) -> bool:
    return kind.forward is not nn.Module.forward


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield the configs within a config."""
    yield from (value for value in vars(config).values() if isinstance(value, PretrainedConfig))


def other_parts(config: PretrainedConfig) -> frozenset[str]:
    """Return what a wrapper calls its parts that are not the text decoder: vision, audio, talker and the like."""
    text, names, whole = text_config(config), set(), config
    while whole is not text:
        inner = whole
        for name, part in vars(whole).items():
            if isinstance(part, PretrainedConfig):
                if part is text or _contains(part, text):
                    inner = part
                else:
                    names.add(name.removesuffix("_config"))
        if inner is whole:
            break
        whole = inner
    return frozenset(names)


def _contains(config: PretrainedConfig, text: PretrainedConfig) -> bool:
    return any(part is text or _contains(part, text) for part in _parts(config))


def decoder_of(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Return the text decoder in a model, with its name there: the whole model where it is nothing but that."""
    return next(decoder_parts(model), ("", model))


def decoder_parts(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the modules that are a text decoder, with or without its head, the outermost first; with their names."""
    # Told by its config's class: the text config may have been copied on its way into the decoder.
    kind = type(text_config(model.config))
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and type(part.config) is kind:
            yield name, part


def decoder_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules of the text decoder, by their names in the model."""
    prefix, _ = decoder_of(model)
    modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    return {name: module for name, module in modules.items() if not prefix or f"{name}.".startswith(f"{prefix}.")}


def own_cache(model: PreTrainedModel) -> str | None:
    """Return the name of the cache class that a decoder brings in its own code and fills itself, or None."""
    _, decoder = decoder_of(model)
    for kind in {type(model), type(decoder), *(type(part) for part in decoder.children())}:
        code = sys.modules[kind.__module__]
        for name, found in vars(code).items():
            if not (isinstance(found, type) and found.__module__ == code.__name__ and name.endswith("Cache")):
                continue
            # A layer of transformers' cache has a class of its own in some models: that is another matter.
            keeps = issubclass(found, Cache) or (hasattr(found, "update") and hasattr(found, "get_seq_length"))
            if keeps and not issubclass(found, CacheLayerMixin) and re.search(rf"\b{name}\(", inspect.getsource(kind)):
                return name
    return None


def cross_attention_layers(modules: Mapping[str, nn.Module]) -> frozenset[int]:
    """Return the layers of a decoder whose only attention is to something beside the text. modules: by name."""
    found = set()
    for name, module in modules.items():
        if match := _BLOCK.search(name):
            attending = [child for child, _ in module.named_children() if _ATTENTION.search(child)]
            if attending and all(_CROSS.search(child) for child in attending):
                found.add(int(match[1]))
    return frozenset(found)


def query_heads(config: PretrainedConfig) -> int:
    """Return the query heads of each layer of a decoder, 0 where it has none; raises ModelError where layers differ."""
    try:
        return int(getattr(config, "num_attention_heads", None) or 0)
    except RuntimeError:  # of transformers, for what layers have each
        raise ModelError(
            f"{type(config).__name__}: its layers differ in their query heads, and kvprof measures models of one "
            "number for all.\n  kvprof inspect lists what such a model caches."
        ) from None


def layers_without_values(modules: Mapping[str, nn.Module]) -> frozenset[int]:
    """Return the layers of a decoder that make their values of what the keys' matrix puts out. modules: by name."""
    found = set()
    for name, module in modules.items():
        match = _IN_BLOCK.search(name)
        has_keys = isinstance(getattr(module, "k_proj", None), nn.Module)
        if match and has_keys and getattr(module, "v_proj", module) is None:
            found.add(int(match[1]))
    return frozenset(found)


def cache_argument(model: PreTrainedModel) -> str:
    """Return what a model's forward, and its `generate`, call the cache: `past_key_values` before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether a model, or the decoder in it, can be given what was kept of the tokens before."""
    parts = [model, *(part for _, part in decoder_parts(model))]
    return any(not _CACHES.isdisjoint(inspect.signature(part.forward).parameters) for part in parts)


def other_memory(model: PreTrainedModel) -> str | None:
    """Return what a model's forward calls that which it keeps in the place of a cache; None where it takes a cache."""
    taken = _CACHES.intersection(inspect.signature(model.forward).parameters)
    return None if taken & {"cache", "past_key_values"} else min(taken, default=None)


def check_reads_text(model: PreTrainedModel) -> None:
    """Raise ModelError for a model that does not run on text alone: a wrapper may need an image, a config be unsound.

    Runs it on two tokens, where all its weights are in memory.
    """
    kind = type(model)
    if not _has_forward(kind):
        reason = "it only generates, by several models. Give the one of them that reads text (`model.thinker`)"
    elif needed := _needed(model):
        reason = f"its forward needs {' and '.join(needed)}"
    else:
        found = _failure(model)
        if found is None:
            return
        reason = found
    takes_more = any(_MORE.search(name) for name in inspect.signature(model.forward).parameters)
    raise ModelError(
        f"{kind.__name__} does not run{' on text alone' if takes_more else ''}: {reason.rstrip('.')}.\n"
        "  kvprof inspect and kvprof norms, which run no model, may still read its text decoder."
    )


def _needed(model: PreTrainedModel) -> list[str]:
    """Return what a model's forward cannot do without, beside token ids."""
    return [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name != "input_ids"
    ]


def _failure(model: PreTrainedModel) -> str | None:
    """Return in a model's own words why it does not read two tokens, or None where it does."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None  # accelerate would bring in all its weights for that
    try:
        with quiet(), torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # of a library, for a reason that only it knows
        return None if is_out_of_memory(error) else first_line(error)
    return None
