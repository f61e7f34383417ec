"""Published shapes of models by name, and random models of such a shape: for times and bytes, which need no weights.

Holds what each model's own config says of its decoder. Reads no checkpoint, asks no hub. A model of a shape predicts
nothing; how long it takes to do so is what the real one takes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from kvprof.errors import UsageError, did_you_mean

INIT_RANGE = 0.03
"""Random weights lie between plus and minus this."""


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    positions: int,
    theta: float,
    head_dim: int | None = None,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Return the settings that configs of Llama's kind have in common. heads: of queries, of keys and values."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim or hidden // heads[0],
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
    } | more


def _llama3_rope(factor: float) -> dict[str, Any]:
    """Return how Llama 3.1 and 3.2 stretch their positions from 8,192 to 131,072."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("llama", _llama(4096, 11008, 32, (32, 32), 32_000, 4096, 1e4)),
    "llama-2-13b": ("llama", _llama(5120, 13824, 40, (40, 40), 32_000, 4096, 1e4)),
    "llama-2-70b": ("llama", _llama(8192, 28672, 80, (64, 8), 32_000, 4096, 1e4)),
    "llama-3-8b": ("llama", _llama(4096, 14336, 32, (32, 8), 128_256, 8192, 5e5)),
    "llama-3-70b": ("llama", _llama(8192, 28672, 80, (64, 8), 128_256, 8192, 5e5)),
    "llama-3.1-8b": (
        "llama",
        _llama(4096, 14336, 32, (32, 8), 128_256, 131_072, 5e5, rope_parameters=_llama3_rope(8.0)),
    ),
    "llama-3.1-70b": (
        "llama",
        _llama(8192, 28672, 80, (64, 8), 128_256, 131_072, 5e5, rope_parameters=_llama3_rope(8.0)),
    ),
    "llama-3.2-1b": (
        "llama",
        _llama(2048, 8192, 16, (32, 8), 128_256, 131_072, 5e5, tied=True, rope_parameters=_llama3_rope(32.0)),
    ),
    "llama-3.2-3b": (
        "llama",
        _llama(3072, 8192, 28, (24, 8), 128_256, 131_072, 5e5, tied=True, rope_parameters=_llama3_rope(32.0)),
    ),
    "mistral-7b": ("mistral", _llama(4096, 14336, 32, (32, 8), 32_768, 32_768, 1e6, sliding_window=None)),
    "qwen2.5-0.5b": ("qwen2", _llama(896, 4864, 24, (14, 2), 151_936, 32_768, 1e6, tied=True)),
    "qwen2.5-7b": ("qwen2", _llama(3584, 18944, 28, (28, 4), 152_064, 32_768, 1e6)),
    "qwen2.5-32b": ("qwen2", _llama(5120, 27648, 64, (40, 8), 152_064, 32_768, 1e6)),
    "qwen3-0.6b": ("qwen3", _llama(1024, 3072, 28, (16, 8), 151_936, 40_960, 1e6, 128, tied=True)),
    "qwen3-4b": ("qwen3", _llama(2560, 9728, 36, (32, 8), 151_936, 40_960, 1e6, 128, tied=True)),
    "qwen3-8b": ("qwen3", _llama(4096, 12288, 36, (32, 8), 151_936, 40_960, 1e6, 128)),
    "qwen3-14b": ("qwen3", _llama(5120, 17408, 40, (40, 8), 151_936, 40_960, 1e6, 128)),
    "qwen3-32b": ("qwen3", _llama(5120, 25600, 64, (64, 8), 151_936, 40_960, 1e6, 128)),
    "gemma-2-9b": (
        "gemma2",
        _llama(3584, 14336, 42, (16, 8), 256_000, 8192, 1e4, 256, tied=True, sliding_window=4096)
        | {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "smollm2-135m": ("llama", _llama(576, 1536, 30, (9, 3), 49_152, 8192, 1e5, tied=True)),
    "smollm2-1.7b": ("llama", _llama(2048, 8192, 24, (32, 32), 49_152, 8192, 1.3e5, tied=True)),
}
"""Each shape's kind of config, and its settings."""

SHAPES = tuple(_SHAPES)
"""The names that `shape_config` knows."""


def shape_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """Return the config of a named shape, of its first `layers` layers alone where that is given.

    Raises UsageError for an unknown name, or for more layers than the shape has.
    """
    if name not in _SHAPES:
        raise UsageError(f"unknown shape {name!r}: {did_you_mean(name, SHAPES)}")
    kind, settings = _SHAPES[name]
    has = settings["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= has:
        raise UsageError(f"--layers {layers}: {name} has {has}; keep between 1 and {has} of them.")
    config = CONFIG_MAPPING[kind](**settings | {"num_hidden_layers": layers or has})
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.dtype = torch.bfloat16
    return config


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Return a model of random weights, made on the device itself: in eval mode, no parameter asking for a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    with device, no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.uniform_(-INIT_RANGE, INIT_RANGE, generator=generator)
            else:
                parameter.fill_(1)  # gains, and biases, which a constant leaves harmless
    return model.eval().requires_grad_(False)
