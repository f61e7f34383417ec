"""The bytes of recurrent states, beside those that transformers' own cache holds after a forward."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import TINY, UNUSUAL, skip_unknown
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from kvprof.models.inventory import take_inventory
from kvprof.models.recurrent_states import state_tensors
from kvprof.report.sentences import state_remarks

STATEFUL = ("bamba", "falcon-h1", "inkling", "jamba", "lfm2", "qwen3-next")
ALONE = {"Mamba": {"state_size": 4}, "Mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8}}


def held(config: PretrainedConfig, dtype: torch.dtype, tokens: int, batch: int) -> int:
    """Return the bytes beside keys and values that DynamicCache holds of so many tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    cache = DynamicCache(config=config)
    word = "cache_params" if type(config).__name__.startswith("Mamba") else "past_key_values"
    with torch.no_grad():
        model(input_ids=torch.full((batch, tokens), 5), use_cache=True, **{word: cache})
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    return sum(x.numel() * x.element_size() for layer in layers for x in state_tensors(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STATEFUL)
def test_states_have_the_bytes_that_transformers_holds(name: str, dtype: torch.dtype) -> None:
    skip_unknown(name)
    config = (TINY | UNUSUAL)[name]()
    config.dtype = dtype
    geometry = take_inventory(config).geometry
    assert geometry.state_bytes() > 0
    assert geometry.uncounted == ()
    for tokens in (1, 3, 20):
        assert geometry.state_bytes() == held(config, dtype, tokens, batch=1)
    assert 2 * geometry.state_bytes() == held(config, dtype, 20, batch=2)
    kept = sum(layer.tokens_kept(20) * geometry.bytes_per_token(layer) for layer in geometry.layers)
    assert geometry.bytes_at(20, batch=3) == 3 * (kept + geometry.state_bytes())
    assert geometry.bytes_at(0, batch=3) == 0


@pytest.mark.parametrize("name", sorted(ALONE))
def test_a_model_of_states_alone_has_their_bytes_at_any_context(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(hidden_size=32, num_hidden_layers=2, vocab_size=96, **ALONE[name])
    config.dtype = torch.float32
    inventory = take_inventory(config)
    assert inventory.bytes_per_token == 0
    assert set(inventory.bytes_at.values()) == {held(config, torch.float32, 9, batch=1)}


def test_a_state_that_the_cache_does_not_hold_is_not_known_instead_of_nothing() -> None:
    config = transformers.RecurrentGemmaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=96,
        lru_width=32,
        block_types=["recurrent", "recurrent", "attention"],
    )
    geometry = take_inventory(config).geometry
    assert [layer.layer for layer in geometry.uncounted] == [0, 1]
    assert state_remarks(geometry) == ["layers 0-1: recurrent states whose size is not known, and is not counted"]


def test_a_model_of_keys_and_values_alone_has_no_states() -> None:
    geometry = take_inventory(TINY["llama"]()).geometry
    assert (geometry.state_bytes(), geometry.uncounted, state_remarks(geometry)) == (0, (), [])
    assert "state" not in geometry.model_dump(mode="json")["layers"][0]
