"""Named shapes are those that were published: by their number of parameters, and by what they cache."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvprof.errors import UsageError
from kvprof.models.config import weight_bytes
from kvprof.models.inventory import take_inventory
from kvprof.models.shapes import SHAPES, random_model, shape_config

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-9b": 9_241_705_984,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
}
"""As the hub counts the checkpoints, embeddings that are tied once."""

CACHED = {
    "llama-2-7b": (32, 32, 128),
    "llama-3-8b": (32, 8, 128),
    "llama-3.2-1b": (16, 8, 64),
    "qwen2.5-7b": (28, 4, 128),
    "qwen3-0.6b": (28, 8, 128),
    "qwen3-8b": (36, 8, 128),
    "mistral-7b": (32, 8, 128),
    "smollm2-135m": (30, 3, 64),
}
"""Layers, KV heads, head dimension."""


def test_every_shape_is_known_here() -> None:
    assert set(SHAPES) == set(PARAMETERS)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_were_published(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert weight_bytes(shape_config(name), "bfloat16") == 2 * PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(CACHED))
def test_a_shape_caches_what_its_model_does(name: str) -> None:
    found = take_inventory(shape_config(name), name)
    assert found.model.id == name
    layers = {(layer.kv_heads, layer.key_head_dim, layer.value_head_dim) for layer in found.geometry.planned}
    assert (len(found.geometry.planned), *layers.pop()) == (*CACHED[name], CACHED[name][2])
    assert not layers


def test_half_of_gemmas_layers_slide() -> None:
    geometry = take_inventory(shape_config("gemma-2-9b")).geometry
    assert (len(geometry.sliding), len(geometry.planned), geometry.num_layers) == (21, 42, 42)


def test_the_first_layers_alone_can_be_kept() -> None:
    config = shape_config("llama-3-8b", 2)
    assert config.num_hidden_layers == 2
    assert shape_config("llama-3-8b").num_hidden_layers == 32  # nobody else's config is changed


@pytest.mark.parametrize(
    ("name", "layers", "words"),
    [
        ("llama-3-8", None, "did you mean 'llama-3-8b'"),
        ("zzz", None, "choose from llama-2-7b"),
        ("llama-3-8b", 33, "llama-3-8b has 32"),
        ("llama-3-8b", 0, "between 1 and 32"),
    ],
)
def test_what_is_no_shape_is_a_usage_error(name: str, layers: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        shape_config(name, layers)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_a_random_model_predicts_finite_numbers_and_is_the_same_each_time(name: str) -> None:
    config = shape_config(name, 1)
    config.vocab_size, config.hidden_size, config.intermediate_size = 96, 64, 48
    models = [random_model(config, torch.bfloat16, torch.device("cpu"), seed) for seed in (3, 3, 4)]
    logits = [model(input_ids=torch.tensor([[1, 2, 3]])).logits for model in models]
    assert torch.isfinite(logits[0]).all()
    assert logits[0].std() > 0
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert all(
        not parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in models[0].parameters()
    )
