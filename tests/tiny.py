"""Tiny random models of every architecture: two layers, head dimension 8 or 16, a vocabulary of 96."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "pad_token_id": 0}
_WIDE = _SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96, "pad_token_id": 0}


def _config(name: str, **settings: object) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, name + "Config")(**settings)


_LATENT = _WIDE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _config("Llama", **_WIDE),
    "llama-mha": _config("Llama", **_WIDE | {"num_key_value_heads": 4}),
    "llama-mqa": _config("Llama", **_WIDE | {"num_key_value_heads": 1}),
    "mistral": _config("Mistral", **_WIDE, head_dim=8, sliding_window=None),
    "mistral-sliding": _config("Mistral", **_WIDE, head_dim=8, sliding_window=16),
    "mixtral": _config("Mixtral", **_WIDE, num_local_experts=4, sliding_window=None),
    "qwen2": _config("Qwen2", **_WIDE),
    "qwen3": _config("Qwen3", **_WIDE, head_dim=16),
    "qwen3-moe": _config(
        "Qwen3Moe", **_WIDE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gemma": _config("Gemma", **_WIDE, head_dim=16),
    "gemma2": _config("Gemma2", **_WIDE, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "gemma3": _config(
        "Gemma3Text", **_WIDE, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": _config("Phi", **_WIDE),
    "phi3": _config("Phi3", **_WIDE),
    "gpt2": _config("GPT2", **_GPT),
    "gpt-bigcode-mqa": _config("GPTBigCode", **_GPT, multi_query=True),
    "gpt-bigcode-mha": _config("GPTBigCode", **_GPT, multi_query=False),
    "gpt-neox": _config("GPTNeoX", **_SMALL, intermediate_size=48, max_position_embeddings=64),
    "gptj": _config("GPTJ", **_GPT, rotary_dim=4),
    "codegen": _config("CodeGen", **_GPT, rotary_dim=4),
    "bloom": _config("Bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=96, pad_token_id=0),
    "opt": _config("OPT", **_SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    "falcon-mqa": _config("Falcon", **_SMALL, multi_query=True, new_decoder_architecture=False, alibi=False),
    "falcon-mha": _config("Falcon", **_SMALL, multi_query=False, new_decoder_architecture=False, alibi=True),
    "falcon-grouped": _config("Falcon", **_SMALL, new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "mpt": _config("Mpt", d_model=32, n_heads=4, n_layers=2, vocab_size=96, max_seq_len=64, pad_token_id=0),
    "starcoder2": _config("Starcoder2", **_WIDE, sliding_window=None),
    "olmo2": _config("Olmo2", **_WIDE),
    "cohere": _config("Cohere", **_WIDE, use_qk_norm=True),
    "stablelm": _config("StableLm", **_WIDE),
    "granite": _config("Granite", **_WIDE, attention_multiplier=0.25, residual_multiplier=0.5, logits_scaling=2.0),
    "smollm3": _config("SmolLM3", **_WIDE, no_rope_layers=[1, 0]),
    "gpt-oss": _config(
        "GptOss",
        **_WIDE,
        head_dim=8,
        num_local_experts=4,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "jetmoe": _config(
        "JetMoe",
        **_SMALL,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=48,
        max_position_embeddings=64,
        num_local_experts=4,
    ),
    "persimmon": _config("Persimmon", **_SMALL, intermediate_size=48, max_position_embeddings=64),
    "dbrx": _config(
        "Dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=96,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "deepseek-v2": _config("DeepseekV2", **_LATENT, q_lora_rank=None),
    "deepseek-v3": _config("DeepseekV3", **_LATENT, q_lora_rank=8),
}


APART: dict[str, Callable[[], PretrainedConfig]] = {
    "xglm": _config(
        "XGLM", d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, vocab_size=96, max_position_embeddings=64
    ),
}
"""Models that cannot do what the others can: with an attention that nobody can ask."""


_LONG = _WIDE | {"max_position_embeddings": 256}
_MAMBA = {"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

UNUSUAL: dict[str, Callable[[], PretrainedConfig]] = {
    "falcon-h1": _config(
        "FalconH1", **_LONG | {"num_hidden_layers": 2}, head_dim=8, mamba_d_ssm=32, mamba_d_head=8, **_MAMBA
    ),
    "bamba": _config("Bamba", **_LONG | {"num_hidden_layers": 3}, attn_layer_indices=[1], mamba_d_head=16, **_MAMBA),
    "jamba": _config(
        "Jamba",
        **_LONG | {"num_hidden_layers": 4},
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "qwen3-next": _config(
        "Qwen3Next",
        **_LONG | {"num_hidden_layers": 4},
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "lfm2": _config(
        "Lfm2", **_LONG | {"num_hidden_layers": 3}, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8
    ),
    "gemma3n": _config(
        "Gemma3nText",
        **_LONG | {"num_hidden_layers": 4},
        head_dim=8,
        sliding_window=16,
        num_kv_shared_layers=1,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=_ALTERNATING,
    ),
    "gemma4": _config(
        "Gemma4Text",
        **_LONG | {"num_hidden_layers": 4},
        head_dim=8,
        global_head_dim=16,
        sliding_window=16,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        layer_types=_ALTERNATING,
    ),
    "inkling": _config(
        "InklingText",
        **_LONG | {"num_hidden_layers": 4},
        head_dim=8,
        d_rel=4,
        rel_extent=32,
        swa_head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        sliding_window_size=16,
        layer_types=["hybrid_sliding", "hybrid"] * 2,
        mlp_layer_types=["dense", "sparse"] * 2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=16,
    ),
    "deepseek-v32": _config(
        "DeepseekV32",
        **_LATENT | {"max_position_embeddings": 256},
        q_lora_rank=8,
        index_topk=12,
        index_head_dim=8,
        index_n_heads=32,
    ),
}
"""Layers with a recurrent state beside attention or in its place, layers that read another layer's cache, and layers
whose attention reads what an indexer selects."""


SHARE = ("gemma3n", "gemma4")
"""Those with layers that read another layer's cache, which kvprof plans from transformers 5.23 on."""

KNOWS_SHARING = Version(transformers.__version__) >= Version("5.23")


LATENTS = ("deepseek-v2", "deepseek-v3", "deepseek-v32")
"""Those of latent attention, whose latent is what transformers caches."""


MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss", "jetmoe", "dbrx", "deepseek-v2", "deepseek-v3")
"""Those whose experts are multiplied as groups, which knows no float64: set their implementation to `eager` first."""


def skip_unknown(name: str) -> None:
    """Skip a test of what the installed transformers is too old for."""
    if name == "inkling" and not hasattr(transformers, "InklingTextConfig"):
        pytest.skip("this transformers does not know Inkling")
    if name in SHARE and not KNOWS_SHARING:
        pytest.skip("before transformers 5.23 a model that shares keys and values is refused (test_inventory.py)")


def tiny_model(name: str) -> PreTrainedModel:
    """Build a tiny model with weights large enough for every path to matter, biases and gains included."""
    skip_unknown(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((TINY | UNUSUAL | APART)[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval().requires_grad_(False)
