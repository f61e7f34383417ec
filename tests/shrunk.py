"""Every decoder type that the installed transformers knows, by its default config shrunk to a tiny random model.

Knows settings by their names, no model by its. Does not know kvprof.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

MAPPINGS = ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM")
"""The auto mappings that have decoders, those of wrappers first."""

LAYERS = 4
VOCABULARY = 320

_LAYER_COUNT = r"^(num_hidden_layers|n_layers?|num_layers|num_decoder_layers|decoder_layers)$"

# The first that matches says what a whole number of a config becomes.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"index_n_heads", 32),  # with few, the scores of many keys are 0, and which of them are read is anybody's choice
    (r"rotary_dim|index_topk", 8),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"expand$|attn_layer_offset|^vision_feature_layer$", 1),
    (r"attn_layer_period|attention_layer_period", 2),
    (_LAYER_COUNT, LAYERS),
    (r"layers$|depth|num_blocks", 2),
    (r"vocab", VOCABULARY),
    (r"num_(global_)?key_value_heads|num_kv_heads|multi_query_group_num|num_key_value_groups", 2),
    (r"heads$|n_head$|num_head$", 4),
    (r"experts_per_tok|top_k|moe_k|topk", 2),
    (r"expert", 4),
    (r"head_dim|head_size|kv_channels|v_head|qk_|_d_head", 16),
    (r"lora_rank", 16),
    (r"^(hidden_size|d_model|n_embd|dim|embed_dim|word_embed_proj_dim|dim_model)$", 64),
    (r"intermediate|ffn|inner|ff_dim|n_inner", 96),
    (r"max_(position_embeddings|seq|source|length|position)|n_positions|n_ctx", 256),
    (r"sliding_window|local_attention|attention_chunk_size|window_size", 16),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"hidden_size|_dim$|embed|width", 64),
    (r"mel_bins", 16),
)


def types() -> list[str]:
    """Return every model type of the mappings, in alphabetical order."""
    return sorted({kind for mapping in MAPPINGS for kind in getattr(modeling_auto, _names(mapping))})


def model_class(kind: str) -> type[PreTrainedModel]:
    """Return the class that transformers has for a type, the wrapper's where there is one."""
    config_class = CONFIG_MAPPING[kind]
    for mapping in MAPPINGS:
        found = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING")
        if config_class in found:
            chosen = found[config_class]
            return chosen[0] if isinstance(chosen, tuple) else chosen
    raise KeyError(kind)


def shrunk(kind: str) -> PretrainedConfig:
    """Return a type's default config made small."""
    config = CONFIG_MAPPING[kind]()
    # Rotary embeddings of several axes have sections, which some models' code knows where their config does not.
    sections = "mrope_section" in inspect.getsource(sys.modules[model_class(kind).__module__])
    return _small(config, sections)


_LEFT_OUT = (
    "num_layers_per_stack",
    "transformers_version",
    "architectures",
    "torch_dtype",
    "dtype",
    "ignore_keys_at_rope_validation",
)


def _small(config: PretrainedConfig, sections: bool) -> PretrainedConfig:
    plain = {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in _LEFT_OUT}
    counts = {value for name, value in plain.items() if re.search(_LAYER_COUNT, name) and type(value) is int}
    settings = {name: _setting(name, value, counts, sections) for name, value in plain.items()}
    if "qk_nope_head_dim" in settings and "qk_head_dim" in settings:
        settings["qk_head_dim"] = settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"]
    if settings.get("kv_lora_rank") is not None and "num_attention_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # a head's own keys are made of the latent
    share = _partial(settings)
    for rope in (settings.get(name) for name in ("rope_parameters", "rope_scaling")):
        if isinstance(rope, dict) and ("mrope_section" in rope or sections):
            half = int(16 * share * rope.get("partial_rotary_factor", 1)) // 2
            rope["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
    for name, small in (("head_dim", 16), ("num_key_value_heads", 4), ("num_experts_per_tok", 2)):
        if name in settings and settings[name] is None:
            settings[name] = small
    return type(config)(**settings)


def _partial(settings: dict[str, Any]) -> float:
    return settings.get("partial_rotary_factor") or 1.0


def _setting(name: str, value: Any, counts: set[int], sections: bool) -> Any:
    if isinstance(value, PretrainedConfig):
        return _small(value, sections)
    if type(value) is int:
        return _number(name, value)
    if isinstance(value, list | tuple):
        if len(value) in counts:
            return _sample(list(value))
        if name.endswith("_layers"):  # which layers are of a kind
            return [place for place in value if place < LAYERS]
    return copy.deepcopy(value)


def _number(name: str, value: int) -> int:
    if re.search(r"token.*_(id|index)$|^(bos|eos|pad)_", name):
        return value if value < VOCABULARY else VOCABULARY - 1 - value % 40
    for pattern, small in _SIZES:
        if re.search(pattern, name):
            return min(small, value)
    return value


def _sample(values: list[Any]) -> list[Any]:
    """Return as many values as there are layers left, each different one among them."""
    texts = [repr(value) for value in values]
    chosen = [texts.index(text) for text in dict.fromkeys(texts)]
    chosen += [place for place in range(len(values)) if place not in chosen]
    return [values[place] for place in sorted(chosen[:LAYERS])]


def _names(mapping: str) -> str:
    return f"MODEL_FOR_{mapping}_MAPPING_NAMES"


def build(kind: str) -> PreTrainedModel:
    """Return a tiny random model of a type."""
    torch.manual_seed(0)
    model = model_class(kind)(shrunk(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn(parameter.shape) * 0.05).to(parameter.dtype))
    return model.eval().requires_grad_(False)
