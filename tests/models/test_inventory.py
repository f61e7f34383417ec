"""What a config alone says of a model's cache. The truth is what each architecture's paper and model card say of it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import transformers
from shrunk import shrunk
from tiny import KNOWS_SHARING, LATENTS, SHARE, TINY, UNUSUAL, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig
from typer.testing import CliRunner

from kvprof.cli.app import app
from kvprof.errors import KvprofError, ModelError
from kvprof.models.decoder import query_heads
from kvprof.models.inventory import position_limit, take_inventory
from kvprof.records.inventory import Inventory

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
FULL, SLIDING = "full_attention", "sliding_attention"


def config(name: str, layers: int = 4, **settings: object) -> PretrainedConfig:
    made: PretrainedConfig = getattr(transformers, name + "Config")(**SIZES | {"num_hidden_layers": layers} | settings)
    return made


def kinds(inventory: Inventory) -> list[str]:
    return [layer.kind for layer in inventory.geometry.layers]


def flags(inventory: Inventory) -> dict[str, tuple[int, ...]]:
    return {flag.name: flag.layers for flag in inventory.red_flags}


def test_a_plain_decoder_caches_every_layer_and_raises_no_flag() -> None:
    inventory = take_inventory(config("Llama"), "org/plain")
    assert kinds(inventory) == ["full"] * 4
    assert flags(inventory) == {}
    assert inventory.model.id == "org/plain"
    assert inventory.model.num_layers == 4
    for layer in inventory.geometry.layers:
        assert (layer.kv_heads, layer.key_head_dim, layer.value_head_dim, layer.window) == (2, 8, 8, None)


def test_a_bias_of_k_proj_is_flagged() -> None:
    assert flags(take_inventory(config("Qwen2"))) == {"key_bias": (0, 1, 2, 3)}
    assert flags(take_inventory(config("Llama", attention_bias=True))) == {"key_bias": (0, 1, 2, 3)}


@pytest.mark.parametrize(
    ("name", "offset"), [("Qwen3", 0), ("Gemma3Text", 1), ("Olmo2", 0), ("Qwen3Moe", 0)], ids=lambda value: str(value)
)
def test_a_norm_after_k_proj_is_flagged_with_what_its_gain_means(name: str, offset: int) -> None:
    extra = {"Gemma3Text": {"head_dim": 8}, "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16}}.get(name, {})
    inventory = take_inventory(config(name, **extra))
    assert flags(inventory) == {"key_norm": (0, 1, 2, 3)}
    assert inventory.key_norm_offset == offset


def test_a_norm_without_gains_is_flagged_too() -> None:
    inventory = take_inventory(
        config("Llama4Text", head_dim=8, use_qk_norm=True, no_rope_layers=[1, 1, 1, 0], intermediate_size_mlp=48)
    )
    assert flags(inventory) == {"key_norm": (0, 1, 2)}  # where there are rotary embeddings
    assert inventory.key_norm_offset is None
    assert kinds(inventory) == ["full", "full", "full", "full"]  # chunks of 8192 never end within 64 tokens


def test_chunked_layers_are_planned_with_their_chunk_as_a_window() -> None:
    inventory = take_inventory(
        config("Llama4Text", head_dim=8, no_rope_layers=[1, 1, 1, 0], attention_chunk_size=16, intermediate_size_mlp=48)
    )
    assert kinds(inventory) == ["chunked"] * 3 + ["full"]
    assert [layer.window for layer in inventory.geometry.planned] == [16, 16, 16, None]


def test_gemma_2_alternates_windows_and_caps_its_logits() -> None:
    inventory = take_inventory(config("Gemma2", head_dim=8, sliding_window=16))
    assert kinds(inventory) == ["sliding", "full"] * 2
    assert [layer.window for layer in inventory.geometry.planned] == [16, None, 16, None]
    assert [layer.layer for layer in inventory.geometry.sliding] == [0, 2]
    assert flags(inventory) == {"softcap": (0, 1, 2, 3)}
    assert flags(take_inventory(config("Gemma2", head_dim=8, attn_logit_softcapping=None))) == {}


def test_every_layer_of_a_sliding_mistral_can_be_planned() -> None:
    inventory = take_inventory(config("Mistral", sliding_window=16))
    assert kinds(inventory) == ["sliding"] * 4
    assert inventory.geometry.planned == inventory.geometry.sliding == inventory.geometry.layers
    assert kinds(take_inventory(config("Mistral", sliding_window=None))) == ["full"] * 4


def test_a_window_as_long_as_the_context_is_no_window() -> None:
    assert kinds(take_inventory(config("Mistral", sliding_window=64))) == ["full"] * 4
    assert kinds(take_inventory(config("Mistral", sliding_window=63))) == ["sliding"] * 4


def test_a_window_that_is_switched_off_is_no_window() -> None:
    inventory = take_inventory(config("Qwen2", use_sliding_window=False, sliding_window=16))
    assert kinds(inventory) == ["full"] * 4


def test_gpt_oss_has_sinks_windows_and_biases() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    inventory = take_inventory(
        config("GptOss", head_dim=8, num_local_experts=4, sliding_window=16, rope_parameters=rope)
    )
    assert kinds(inventory) == ["sliding", "full"] * 2
    assert flags(inventory) == {"attention_sinks": (0, 1, 2, 3), "key_bias": (0, 1, 2, 3)}


@pytest.mark.skipif(not KNOWS_SHARING, reason="refused before transformers 5.23")
def test_layers_that_read_another_layers_cache_have_none_of_their_own() -> None:
    inventory = take_inventory(
        config(
            "Gemma3nText",
            6,
            head_dim=8,
            num_kv_shared_layers=2,
            layer_types=[SLIDING, FULL] * 3,
            sliding_window=16,
            intermediate_size=[48] * 6,
            activation_sparsity_pattern=[0.0] * 6,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=96,
            laurel_rank=4,
        )
    )
    assert kinds(inventory) == ["sliding", "full", "sliding", "full", "shared", "shared"]
    assert "another layer's keys and values" in str(inventory.geometry.layers[4].skipped)
    assert inventory.key_norm_offset == 0


def test_a_layer_whose_values_are_made_of_its_keys_matrix_caches_both() -> None:
    geometry = take_inventory(
        config(
            "Gemma4Text",
            attention_k_eq_v=True,
            head_dim=8,
            global_head_dim=8,
            num_global_key_value_heads=2,
            layer_types=[SLIDING, FULL, SLIDING, FULL],
            sliding_window=16,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=96,
            num_kv_shared_layers=0,
        )
    ).geometry
    assert [layer.values_of_key_projection for layer in geometry.layers] == [False, True, False, True]
    assert [(layer.key_width, layer.value_width) for layer in geometry.planned] == [(16, 16)] * 4


RECURRENT = {
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "RecurrentGemma": {"head_dim": 8, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "Qwen3Next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", FULL] * 2,
        "num_experts": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "Bamba": {
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "Lfm2": {"full_attn_idxs": [1, 3], "layer_types": ["conv", FULL] * 2},
    "OlmoHybrid": {"layer_types": ["linear_attention", FULL] * 2},
}
KNOWN_RECURRENT = [
    name
    for name in RECURRENT
    if hasattr(transformers, name + "Config") and (KNOWS_SHARING or name != "RecurrentGemma")  # a cache since 5.23
]


@pytest.mark.parametrize("name", [name for name in sorted(RECURRENT) if name in KNOWN_RECURRENT])
def test_recurrent_layers_are_skipped_with_a_reason_and_attention_beside_them_is_measured(name: str) -> None:
    inventory = take_inventory(config(name, **RECURRENT[name]))
    attention = "sliding" if name == "RecurrentGemma" else "full"
    assert kinds(inventory) == ["recurrent", attention] * 2
    assert "state of fixed size" in str(inventory.geometry.layers[0].skipped)
    assert inventory.geometry.layers[0].key_width == 0
    assert inventory.geometry.layers[1].key_width > 0


def test_attention_beside_a_recurrent_state_is_hybrid_and_planned() -> None:
    inventory = take_inventory(
        config("FalconH1", head_dim=8, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_d_ssm=64)
    )
    assert kinds(inventory) == ["hybrid"] * 4
    assert inventory.geometry.planned == inventory.geometry.layers
    assert all(layer.key_width == 16 for layer in inventory.geometry.layers)


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba"])
def test_a_model_without_attention_has_nothing_to_plan(name: str) -> None:
    inventory = take_inventory(config(name, state_size=4))
    assert kinds(inventory) == ["recurrent"] * 4
    assert inventory.geometry.planned == ()


@pytest.mark.parametrize("name", LATENTS)
def test_latents_are_counted_as_transformers_holds_them(name: str) -> None:
    model = tiny_model(name)
    cache = DynamicCache(config=model.config)
    model(torch.full((2, 7), 5), past_key_values=cache)
    inventory = take_inventory(model.config)
    for layer, held in zip(inventory.geometry.layers, cache.layers, strict=True):
        assert (layer.kind, layer.kv_heads, layer.key_head_dim, layer.value_head_dim) == ("latent", 1, 16, 4)
        assert tuple(held.keys.shape) == (2, 1, 7, 16)
        assert tuple(held.values.shape) == (2, 1, 7, 4)
    parts = [x for layer in cache.layers for x in (layer.keys, layer.values, getattr(layer, "indexer_keys", None))]
    held_bytes = sum(x.numel() * x.element_size() for x in parts if x is not None)
    assert inventory.geometry.bytes_at(7, batch=2) == held_bytes == 14 * inventory.bytes_per_token


@pytest.mark.parametrize(("name", "indexer"), [("DeepseekV3", 0), ("DeepseekV32", 128), ("LongcatFlash", 0)])
def test_the_numbers_of_a_token_that_published_models_cache(name: str, indexer: int) -> None:
    """576 a layer by the reports of DeepSeek-V3 and LongCat-Flash; 128 more in FP8 by the inference code of V3.2."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip("this transformers has no such model")
    geometry = take_inventory(getattr(transformers, f"{name}Config")()).geometry
    for layer in geometry.layers:
        assert (layer.key_width + layer.value_width, layer.indexer_width) == (576, indexer)
        assert geometry.bytes_per_token(layer) == 2 * (576 + indexer)
    assert geometry.num_layers == {"LongcatFlash": 56}.get(name, 61)


def test_a_latent_without_a_rotary_part_is_counted_and_left_alone() -> None:
    if not hasattr(transformers, "MistralLarge4TextConfig"):
        pytest.skip("this transformers has no Mistral Large 4")
    geometry = take_inventory(shrunk("mistral_large4")).geometry
    rotary, plain = geometry.layers[0], geometry.layers[3]
    assert (rotary.value_width, rotary.skipped) == (16, None)
    assert (plain.kind, plain.key_width, plain.value_width, plain.indexer_width) == ("latent", 16, 0, 16)
    assert "(MLA) without a rotary part" in str(plain.skipped)


def test_a_latent_with_a_window_is_counted_by_its_window_and_left_alone() -> None:
    config = TINY["deepseek-v3"]()
    config.sliding_window = 5
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    model(torch.full((1, 4), 5), past_key_values=cache)
    geometry = take_inventory(model.config).geometry
    layer = geometry.layers[0]
    assert (layer.kind, layer.window, layer.key_width, layer.value_width) == ("latent", 5, 16, 4)
    assert "(MLA) with a window of 5 tokens" in str(layer.skipped)
    held = (cache.layers[0].keys, cache.layers[0].values)
    assert geometry.bytes_at(4) == 2 * sum(x.numel() * 4 for x in held)
    assert geometry.bytes_at(400) == geometry.bytes_at(5)


def test_a_latent_or_an_indexer_wider_than_any_model_s_is_refused() -> None:
    config = UNUSUAL["deepseek-v32"]()
    config.index_head_dim = 2**40
    with pytest.raises(ModelError, match="would cache 1099511627776 numbers a token"):
        take_inventory(config)


def test_a_rank_that_a_model_does_not_use_makes_no_latent() -> None:
    config = TINY["llama"]()
    config.kv_lora_rank = 16
    assert take_inventory(config).geometry == take_inventory(TINY["llama"]()).geometry


def test_a_cache_class_made_of_a_sliding_one_may_hold_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlimited-OCR's slides over what it generates, and keeps every token of the prompt."""

    class Keeps(transformers.cache_utils.DynamicSlidingWindowLayer):  # type: ignore[misc]
        pass

    config = TINY["mistral-sliding"]()
    layers = [Keeps(sliding_window=16) for _ in range(config.num_hidden_layers)]
    cache = type("Cache", (), {"layers": layers})()
    monkeypatch.setattr("kvprof.models.layer_kinds.DynamicCache", lambda config: cache)
    inventory = take_inventory(config)
    assert kinds(inventory) == ["other"] * 2
    assert "of a kind unknown to kvprof (Keeps)" in str(inventory.geometry.layers[0].skipped)
    assert inventory.bytes_at is None


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_positions_that_is_none_makes_no_window_full(limit: int) -> None:
    config = TINY["mistral-sliding"]()
    config.max_position_embeddings = limit
    assert kinds(take_inventory(config)) == ["sliding"] * 2


def test_a_decoder_of_more_layers_than_its_cache_is_refused() -> None:
    config = transformers.WhisperConfig(encoder_layers=2, decoder_layers=4, d_model=36, is_encoder_decoder=False)
    config.architectures = ["WhisperForCausalLM"]
    with pytest.raises(ModelError, match="has 4 decoder layers, and transformers makes a cache for 2"):
        take_inventory(config)


@pytest.mark.parametrize(("name", "kept"), [("Rwkv", "state"), ("XLNet", "mems")])
def test_a_model_that_keeps_something_else_says_what(name: str, kept: str) -> None:
    with pytest.raises(ModelError, match=f"keeps no keys and values of the tokens before, but a `{kept}`"):
        take_inventory(getattr(transformers, f"{name}Config")())


def test_query_heads_that_differ_by_layer_are_refused_in_a_sentence() -> None:
    class Differs:
        @property
        def num_attention_heads(self) -> int:
            raise RuntimeError("'num_attention_heads' is a per-layer attribute and may vary across layers.")

    with pytest.raises(ModelError, match="Differs: its layers differ in their query heads"):
        query_heads(Differs())  # type: ignore[arg-type]
    assert query_heads(transformers.MambaConfig()) == 0


def test_a_cache_that_is_not_known_has_no_bytes_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    code = transformers.models.deepseek_v3.modeling_deepseek_v3
    monkeypatch.delattr(code.DeepseekV3Attention, "expand_kv", raising=False)
    inventory = take_inventory(TINY["deepseek-v3"]())
    assert kinds(inventory) == ["other"] * 2
    assert "caches the keys and values made of the latent" in str(inventory.geometry.layers[0].skipped)
    assert "stores 20 numbers a token" in str(inventory.geometry.layers[0].skipped)
    assert inventory.bytes_per_token is inventory.bytes_at is None


@pytest.mark.parametrize(("name", "limit"), [("llama", 64), ("mpt", 64), ("gpt2", 64), ("opt", 64), ("bloom", None)])
def test_the_positions_that_a_model_was_made_for(name: str, limit: int | None) -> None:
    assert position_limit(TINY[name]()) == limit
    assert take_inventory(TINY[name]()).geometry.positions == limit


def test_a_limit_that_is_none_is_not_written_down() -> None:
    for limit in (0, 2**60):
        assert take_inventory(config("Llama", max_position_embeddings=limit)).geometry.positions is None


def test_keys_and_values_may_be_of_two_widths() -> None:
    if not hasattr(transformers, "MiMoV2FlashConfig"):
        pytest.skip("this transformers has no MiMo-V2")
    layer = take_inventory(transformers.MiMoV2FlashConfig()).geometry.layers[0]
    assert (layer.key_head_dim, layer.value_head_dim) == (192, 128)


def text_of(name: str, model_type: str) -> dict[str, object]:
    return config(name).to_dict() | {"model_type": model_type}


MULTIMODAL = {
    "Gemma3": lambda: transformers.Gemma3Config(
        text_config=config("Gemma3Text", head_dim=8, sliding_window=16).to_dict(), vision_config=VISION
    ),
    "Llava": lambda: transformers.LlavaConfig(
        text_config=config("Llama").to_dict(), vision_config={"model_type": "clip_vision_model"} | VISION
    ),
    "Qwen2VL": lambda: transformers.Qwen2VLConfig(text_config=text_of("Qwen2", "qwen2_vl_text")),
    "Qwen3VL": lambda: transformers.Qwen3VLConfig(text_config=text_of("Qwen3", "qwen3_vl_text")),
}


@pytest.mark.parametrize("name", sorted(MULTIMODAL))
def test_of_a_multimodal_model_the_text_decoder_is_taken(name: str) -> None:
    inventory = take_inventory(MULTIMODAL[name]())
    assert inventory.model.num_layers == 4
    assert {layer.kind for layer in inventory.geometry.layers} <= {"full", "sliding"}
    assert {layer.kv_heads for layer in inventory.geometry.layers} == {2}


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "T5", "Bart", "Whisper", "ViT", "CLIP", "Wav2Vec2"])
def test_a_model_that_is_no_decoder_is_one_message(name: str) -> None:
    with pytest.raises(ModelError, match=r"describes (no decoder|an encoder)"):
        take_inventory(getattr(transformers, name + "Config")())


def test_every_architecture_that_transformers_can_build_gives_an_inventory_or_one_message() -> None:
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    unexplained = []
    for config_class in mapping:
        try:
            made = config_class()
        except Exception:
            continue
        if getattr(made.get_text_config(decoder=True), "num_hidden_layers", 0) > 32:
            continue  # it takes seconds
        try:
            take_inventory(made)
        except KvprofError:
            pass
        except Exception as error:
            unexplained.append(f"{config_class.__name__}: {error!r}")
    assert unexplained == []


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_dtype_is_the_configs(name: str) -> None:
    made = TINY[name]()
    assert take_inventory(made).geometry.dtype == "bfloat16"  # nothing says so: 16 bits are assumed
    assert take_inventory(made).dtype_assumed
    for dtype in (torch.float32, torch.float16):
        made.dtype = dtype
        assert take_inventory(made).geometry.dtype == str(dtype).removeprefix("torch.")
        assert not take_inventory(made).dtype_assumed


def test_inspecting_needs_a_config_and_nothing_else(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config("Gemma2", head_dim=8, sliding_window=16).save_pretrained(in_tmp / "bare")
    assert [file.name for file in (in_tmp / "bare").iterdir()] == ["config.json"]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(socket, "socket", None)
    result = CliRunner().invoke(app, ["inspect", "bare", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.output)
    assert printed["geometry"]["layers"][0]["window"] == 16
    per_token = 2 * (16 + 16) * 2  # of four layers two grow; 16 bits, where nothing says more
    assert printed["bytes_per_token"] == per_token
    assert printed["bytes_at"] == {"64": per_token * (64 + 16)}  # the model was made for 64 positions
    assert CliRunner().invoke(app, ["inspect", "bare"]).exit_code == 0


def test_a_saved_config_gives_the_live_models_inventory(tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    model.config.save_pretrained(tmp_path)
    assert take_inventory(AutoConfig.from_pretrained(tmp_path)).geometry == take_inventory(model.config).geometry


def test_a_model_that_brings_a_cache_class_of_its_own_is_refused_by_its_name() -> None:
    with pytest.raises(ModelError, match="MiniMaxForCausalLM brings a cache class of its own, MiniMaxCache"):
        take_inventory(config("MiniMax", head_dim=8, layer_types=["linear_attention", FULL] * 2, num_local_experts=2))


def test_blocks_that_run_several_times_a_token_are_refused_with_their_number() -> None:
    with pytest.raises(ModelError, match="runs stacks of 4 blocks several times a token, as 32 layers of its cache"):
        take_inventory(config("HrmText", num_hidden_layers=4, H_cycles=2, L_cycles=3))


@pytest.mark.skipif(KNOWS_SHARING, reason="planned since transformers 5.23")
@pytest.mark.parametrize("name", SHARE)
def test_before_transformers_5_23_a_model_that_shares_keys_and_values_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"kvprof plans such a model from transformers 5\.23 on"):
        take_inventory(UNUSUAL[name]())
