"""A model's config: of config.json, of a GGUF file's metadata or of a loaded model; the dtype that it will load in."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from kvprof.errors import UsageError, did_you_mean
from kvprof.models.checkpoint.gguf_header import STAND_IN
from kvprof.models.checkpoint.gguf_model import open_gguf, write_without_vocabulary
from kvprof.models.checkpoint.stored_dtype import stored_dtype
from kvprof.models.decoder import text_config
from kvprof.models.inventory import ASSUMED_DTYPE, own_dtype
from kvprof.models.loaded import live_config
from kvprof.models.own_code import read_object
from kvprof.models.skeleton import build_skeleton
from kvprof.models.source import ModelSource, explained, loading_arguments, silent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SIZES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "hidden_size": ("n_embd", "d_model", "dim"),
}
"""Sizes of a decoder, and what configs call them that read other names too."""


def load_config(source: ModelSource) -> PretrainedConfig:
    """Load a model's config; of a GGUF file, the one that its metadata describes."""
    if source.live is not None:
        return live_config(source.live)
    place = source.fetch(weights=False)
    if place.is_file():
        return gguf_config(source, place)
    arguments = loading_arguments(source, place)
    with explained(source, "config"), silent():
        config: PretrainedConfig = AutoConfig.from_pretrained(**arguments)
    if config.dtype is None and (dtype := stored_dtype(place, source.hub_id)) is not None:
        _set_dtype(config, dtype)
    return config


def sizes_by_default(source: ModelSource, config: PretrainedConfig) -> dict[str, int]:
    """Return the sizes of the text decoder that a config.json leaves to transformers' defaults, and what those are."""
    place = source.fetch(weights=False) if source.live is None else None
    if place is None or place.is_file():
        return {}
    text = text_config(config)
    written = _table_of(text, config, read_object(place / "config.json"))
    try:
        usual = type(text)()
    except Exception:  # of code that comes with a model: its sizes have no defaults
        return {}
    found = {}
    for name, others in _SIZES.items():
        value = getattr(text, name, None)
        named = {name, text.attribute_map.get(name), *others}.intersection(written)
        if not named and type(value) is int and value == getattr(usual, name, None):
            found[name] = value
    return found


def _table_of(text: PretrainedConfig, config: PretrainedConfig, written: Mapping[str, object]) -> Mapping[str, object]:
    """Return the part of a config.json that the text decoder's config was made of; an empty one where it has none."""
    if config is text:
        return written
    for name, part in vars(config).items():
        if isinstance(part, PretrainedConfig) and text_config(part) is text:
            inside = written.get(name)
            return _table_of(text, part, inside if isinstance(inside, dict) else {})
    return {}


def _set_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Let a config name the dtype that transformers will load all of the model in, as transformers then does itself."""
    for part in {id(part): part for part in (config, text_config(config))}.values():
        part.dtype = dtype


def gguf_config(source: ModelSource, gguf: Path) -> PretrainedConfig:
    """Load the config that a GGUF file's metadata describes, without the time that its vocabulary takes."""
    model = open_gguf(gguf)
    with explained(source, "config"), silent(), tempfile.TemporaryDirectory() as folder:
        write_without_vocabulary(model, Path(folder) / gguf.name, weights=False)
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=gguf.name, trust_remote_code=False)
    config.name_or_path = str(gguf.parent)
    _set_dtype(config, torch.float32)  # which transformers dequantizes to
    vocabulary = model.headers[0].vocabulary
    if vocabulary is not None and config.vocab_size == STAND_IN:  # counted, where no field says it
        config.vocab_size = vocabulary
    if f"{model.architecture}.attention.head_count_kv" not in model.fields and hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = config.num_attention_heads  # so says the format; a class may have another default
    return config


def dtype_of(config: PretrainedConfig, dtype: str) -> torch.dtype:
    """Return the dtype that a model will be loaded in."""
    return DTYPES.get(dtype) or own_dtype(config) or ASSUMED_DTYPE


def check_dtype(dtype: str) -> None:
    """Raise UsageError for a word that names neither `auto` nor a dtype that a model can be loaded in."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown --dtype {dtype!r}: {did_you_mean(dtype, ['auto', *DTYPES])}")


def weight_bytes(config: PretrainedConfig, dtype: str = "auto") -> int:
    """Return the bytes that a model's weights take in a dtype, counted on its module tree without any storage."""
    modules = build_skeleton(config).modules.values()
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    elements = sum({id(parameter): parameter.numel() for parameter in parameters}.values())  # tied ones are one
    return elements * dtype_of(config, dtype).itemsize
