"""Text decoders in wrappers, and blocks and matrices that are used twice: held against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import save_tokenizer
from shrunk import build
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma4TextConfig,
    PreTrainedModel,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Zamba2Config,
    ZambaConfig,
)

from kvprof.calibration.sequences import Batch
from kvprof.errors import ModelError
from kvprof.models.decoder import cache_argument
from kvprof.models.inventory import take_inventory
from kvprof.models.load import lend, load_model, resolve
from kvprof.profile.gradients import gradient_norms
from kvprof.profile.norms import measure_norms

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def random_weights(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.08)
    return model.eval().requires_grad_(False)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def batch_of(ids: list[int]) -> Batch:
    ids_BT = torch.tensor([ids])
    return Batch((0,), ids_BT, torch.ones_like(ids_BT), ids_BT)


@pytest.mark.parametrize("kind", ["mllama", "qwen2_audio", "voxtral", "granite_speech", "mistral3", "llama4"])
def test_a_wrapper_is_loaded_whole_and_reads_text_as_transformers_own_does(kind: str, tmp_path: Path) -> None:
    folder = saved(build(kind), tmp_path)
    own = AutoModelForMultimodalLM.from_pretrained(folder)
    ids = torch.arange(3, 40)[None]
    try:
        with torch.no_grad():
            expected = own(input_ids=ids).logits
    except AttributeError as error:  # Llama 4's in transformers 5.24
        with pytest.raises(ModelError, match=str(error)):
            load_model(resolve(str(folder)), dtype="float32")
        return
    model = load_model(resolve(str(folder)), dtype="float32")
    assert type(model) is type(own)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_cross_attention_layers_are_named_and_left_alone(tmp_path: Path) -> None:
    model = build("mllama")
    crossing = model.config.text_config.cross_attention_layers
    geometry = take_inventory(model.config).geometry
    assert [layer.layer for layer in geometry.layers if layer.kind == "cross"] == list(crossing)
    assert all("cross-attention" in (geometry.layers[layer].skipped or "") for layer in crossing)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True), cache_argument(model))
    filled = [index for index, layer in enumerate(cache.layers) if layer.keys is not None and layer.keys.numel()]
    assert filled == [layer.layer for layer in geometry.planned]
    scores, _ = measure_norms(resolve(str(saved(model, tmp_path))))
    assert [entry.layer for entry in scores.layers] == filled


def test_of_a_model_that_speaks_the_part_that_reads_text_is_loaded(tmp_path: Path) -> None:
    text = SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 64}
    thinker = {"text_config": text, "vision_config": vision, "audio_config": audio, "vision_start_token_id": 90}
    config = Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    whole = random_weights(Qwen2_5OmniForConditionalGeneration(config))
    folder = saved(whole, tmp_path)
    model = load_model(resolve(str(folder)), dtype="float32")
    assert type(model) is type(whole.thinker)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole.thinker(input_ids=ids).logits)
    scores, inventory = measure_norms(resolve(str(folder)))
    assert inventory.geometry == take_inventory(whole.config).geometry
    for entry, block in zip(scores.layers, whole.thinker.get_decoder().layers, strict=True):
        expected = torch.linalg.matrix_norm(block.self_attn.k_proj.weight.double())
        assert entry.key.frobenius_norm == pytest.approx(float(expected), rel=1e-9)
    with pytest.raises(ModelError, match="only generates"):
        load_model(lend(whole))


def test_a_wrapper_that_needs_an_image_is_refused_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not run on text alone: its forward needs pixel_values"):
        load_model(resolve(str(saved(build("blip-2"), tmp_path))))


def keys_are_values() -> PreTrainedModel:
    config = Gemma4TextConfig(
        **SMALL,
        num_global_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        attention_k_eq_v=True,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        layer_types=[SLIDING, FULL] * 2,
    )
    return random_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def test_where_values_are_made_of_the_keys_matrix_both_are_measured_and_cached(tmp_path: Path) -> None:
    model = keys_are_values()
    scores, inventory = measure_norms(resolve(str(saved(model, tmp_path))))
    alone = [layer.layer for layer in inventory.geometry.layers if layer.values_of_key_projection]
    assert alone == [1, 3]
    assert all(scores.layers[layer].key.spectral_norm == scores.layers[layer].value.spectral_norm for layer in alone)
    with torch.no_grad():
        cache = getattr(model(input_ids=torch.arange(3, 20)[None], use_cache=True), cache_argument(model))
    for layer in alone:
        held, shape = cache.layers[layer], inventory.geometry.layers[layer]
        assert held.keys.shape[1::2] == (shape.kv_heads, shape.key_head_dim)
        assert held.values.shape[1::2] == (shape.kv_heads, shape.value_head_dim)
        assert not torch.equal(held.keys, held.values)


def test_gradients_of_a_shared_matrix_are_those_of_two_matrices_alike() -> None:
    model, batch = keys_are_values(), batch_of(list(range(3, 60)))
    geometry = take_inventory(model.config).geometry
    found = gradient_norms(model, geometry, batch)[0]
    for block in model.model.layers:  # the same model with a W_v of its own, equal to W_k
        attention = block.self_attn
        if attention.v_proj is None:
            attention.v_proj = nn.Linear(64, attention.k_proj.out_features, bias=False)
            attention.v_proj.weight = nn.Parameter(attention.k_proj.weight.clone(), requires_grad=False)
    apart = geometry.model_copy(
        update={
            "layers": tuple(layer.model_copy(update={"values_of_key_projection": False}) for layer in geometry.layers)
        }
    )
    for one, two in zip(found, gradient_norms(model, apart, batch)[0], strict=True):
        assert one == pytest.approx(two, rel=1e-5)


ZAMBA: dict[str, Any] = {"mamba_d_state": 8, "use_mamba_kernels": False, "vocab_size": 96, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config",
    [
        ZambaConfig(
            **ZAMBA,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_mamba_heads=2,
            layers_block_type=["linear_attention", "hybrid"] * 3,
        ),
        Zamba2Config(
            **ZAMBA,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=8,
            num_attention_heads=4,
            n_mamba_heads=8,
            mamba_ngroups=1,
            num_mem_blocks=2,
            layers_block_type=["linear_attention", "hybrid"] * 4,
        ),
    ],
    ids=["one block", "two in turns"],
)
def test_layers_that_share_a_block_have_its_norms_and_a_cache_each(config: Any, tmp_path: Path) -> None:
    model = random_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    scores, inventory = measure_norms(resolve(str(saved(model, tmp_path))))
    geometry = inventory.geometry
    groups: dict[int, list[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith("self_attn.k_proj.weight"):
            groups.setdefault(id(parameter), []).append(int(name.split(".")[2]))
    shared = {group[0]: tuple(group) for group in groups.values() if len(group) > 1}
    assert geometry.shared_blocks == shared != {}
    by_layer = {entry.layer: entry for entry in scores.layers}
    for first, layers in shared.items():
        assert {by_layer[layer].key.spectral_norm for layer in layers} == {by_layer[first].key.spectral_norm}
    with torch.no_grad():
        cache = getattr(model(input_ids=torch.arange(3, 20)[None], use_cache=True), cache_argument(model))
    keys = [cache.layers[layer].keys for layer in by_layer]
    assert all(states.shape[2] == 17 for states in keys)
    assert not torch.equal(keys[0], keys[-1])
