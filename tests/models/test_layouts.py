"""Is what kvprof cuts out of a checkpoint what the model puts into its cache?

The truth is the model itself: at position 0 a rotary embedding turns nothing, so the keys and values that a model
caches for a single token are its projections of that token, and nothing else (but for a norm on the keys).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import UNUSUAL, tiny_model
from transformers import DynamicCache, PreTrainedModel

from kvprof.errors import UnknownLayout
from kvprof.models.checkpoint.files import SafetensorsCheckpoint
from kvprof.models.checkpoint.weights import stream_projections
from kvprof.models.identity import Fingerprint, live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.layouts import find_projections
from kvprof.models.skeleton import build_skeleton


def held_heads(states: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Return cached states (1, H, T, D) with one copy of each KV head: Falcon's grouped layout caches repeats."""
    return states[:, :: states.shape[1] // kv_heads]


def cached_and_input(model: PreTrainedModel) -> tuple[DynamicCache, dict[str, torch.Tensor]]:
    """Run one token; return the cache and the input of every module that has a weight, by name."""
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
    ]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    return cache, inputs


def test_streamed_projections_are_what_the_model_caches(any_tiny: tuple[str, PreTrainedModel], tmp_path: Path) -> None:
    assert streamed_as_cached(any_tiny[1], tmp_path) == 2


@pytest.mark.parametrize("name", sorted(UNUSUAL.keys() - {"inkling"}))  # it convolves what it projects over tokens
def test_of_unusual_layers_those_with_attention_are_streamed_as_the_model_caches_them(
    name: str, tmp_path: Path
) -> None:
    expected = {"falcon-h1": 2, "bamba": 1, "jamba": 2, "qwen3-next": 1, "lfm2": 1, "gemma3n": 3, "gemma4": 2}
    expected["deepseek-v32"] = 2
    assert streamed_as_cached(tiny_model(name), tmp_path) == expected[name]


def streamed_as_cached(model: PreTrainedModel, tmp_path: Path) -> int:
    """Hold the projections that are streamed from a model's checkpoint against what it caches; return of how many."""
    model.save_pretrained(tmp_path)
    geometry = take_inventory(model.config).geometry
    skeleton = build_skeleton(model.config)
    cache, inputs = cached_and_input(model)
    attentions = dict(model.named_modules())
    streamed = list(stream_projections(SafetensorsCheckpoint(tmp_path), geometry, skeleton.config))
    assert [weights.layer for weights in streamed] == list(geometry.scored)
    for weights in streamed:
        projection = skeleton.projections[weights.layer.layer]
        held = cache.layers[weights.layer.layer]
        keys, values = (held_heads(states, weights.layer.kv_heads) for states in (held.keys, held.values))
        for name, weight, bias, states in (
            (projection.key, weights.key, weights.key_bias, keys),
            (projection.value, weights.value, weights.value_bias, values),
        ):
            token = inputs[name].reshape(-1)
            projected = weight @ token + (0 if bias is None else bias)
            if states is keys and (norm := skeleton.key_norm(weights.layer.layer)) is not None:
                live = attentions[projection.attention].get_submodule(norm[0])
                try:
                    projected = live(projected.reshape(1, 1, weights.layer.kv_heads, -1)).reshape(-1)
                except RuntimeError:  # a norm over the whole width, as OLMo2's
                    projected = live(projected.reshape(1, 1, -1)).reshape(-1)
            if states is values and (live := getattr(attentions[projection.attention], "v_norm", None)) is not None:
                projected = live(projected.reshape(1, 1, weights.layer.kv_heads, -1)).reshape(-1)  # Gemma's
            if states is values and weights.layer.is_latent:  # DeepSeek's rotary channels change places, in pairs
                states, projected = states.flatten().sort().values, projected.sort().values
            torch.testing.assert_close(states.reshape(-1), projected, rtol=1e-4, atol=1e-5)
    return len(streamed)


def test_geometry_is_the_shape_of_the_cache(any_tiny: tuple[str, PreTrainedModel]) -> None:
    _, model = any_tiny
    cache, _ = cached_and_input(model)
    for layer in take_inventory(model.config).geometry.layers:
        held = cache.layers[layer.layer]
        assert held_heads(held.keys, layer.kv_heads).shape == (1, layer.kv_heads, 1, layer.key_head_dim)
        assert held_heads(held.values, layer.kv_heads).shape == (1, layer.kv_heads, 1, layer.value_head_dim)


def test_a_live_model_and_its_checkpoint_have_one_fingerprint_in_every_dtype(
    any_tiny: tuple[str, PreTrainedModel], tmp_path: Path
) -> None:
    _, model = any_tiny
    model.save_pretrained(tmp_path)
    geometry = take_inventory(model.config).geometry
    config = model.config.get_text_config(decoder=True)
    fingerprint = Fingerprint()
    for weights in stream_projections(SafetensorsCheckpoint(tmp_path), geometry, config):
        fingerprint.add(weights)
    texts = {fingerprint.text} | {live_fingerprint(model.to(t), geometry) for t in (torch.bfloat16, torch.float16)}
    assert len(texts) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_flipped_weight_changes_the_fingerprint(name: str) -> None:
    model = tiny_model(name)
    geometry = take_inventory(model.config).geometry
    before = live_fingerprint(model, geometry)
    projection = build_skeleton(model.config).projections[1]
    weight = dict(model.named_parameters())[f"{projection.value}.weight"]
    with torch.no_grad():
        weight[-1, -1] *= -1
    assert live_fingerprint(model, geometry) != before


def test_an_unknown_layout_says_what_was_found() -> None:
    with pytest.raises(UnknownLayout, match=r"self_attn\.mystery_proj"):
        find_projections([f"model.layers.{layer}.self_attn.mystery_proj" for layer in range(2)])


def test_a_vision_tower_beside_the_decoder_is_not_taken_for_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    tower = {
        f"vision_tower.encoder.layers.0.self_attn.{part}_proj.weight": torch.randn(16, 16) for part in ("q", "k", "v")
    }
    save_file(tower | state, tmp_path / "model.safetensors")
    geometry = take_inventory(model.config).geometry
    streamed = list(stream_projections(SafetensorsCheckpoint(tmp_path), geometry, model.config))
    assert torch.equal(streamed[0].key, model.model.layers[0].self_attn.k_proj.weight)
