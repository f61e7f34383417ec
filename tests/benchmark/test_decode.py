"""Whole steps: is a cache filled with exactly its context, whatever its layers are, and is a full device an error?"""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3nTextConfig, PreTrainedModel

from kvprof.allocate.unscored import uniform_plan
from kvprof.benchmark import decode as decode_step
from kvprof.benchmark.decode import DecodeSettings, fill, lacks_positions, time_decode
from kvprof.errors import OutOfMemory
from kvprof.models.inventory import take_inventory
from kvprof.records.plan import Window
from kvprof.runtime import PlanCache

SETTINGS = DecodeSettings(context=40, batch=2, steps=3, seed=0)


def planned(model: PreTrainedModel) -> PlanCache:
    inventory = take_inventory(model.config)
    formats = {"key": ("int3g4",), "value": ("int2g8",)}
    window = Window(sink_tokens=1, recent_tokens=4)
    return PlanCache.from_plan(uniform_plan(formats, inventory.model, inventory.geometry, window=window), model)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma3", "gemma2", "mistral-mqa", "falcon-grouped", "gpt2", "mpt", "gpt-bigcode-mqa"]
)
def test_caches_hold_the_whole_context_in_the_bytes_of_the_plan(name: str) -> None:
    model = tiny_model("llama-mqa" if name == "mistral-mqa" else name)
    caches = {"planned": planned(model), "full": DynamicCache(config=model.config)}
    with torch.inference_mode():
        for cache in caches.values():
            fill(cache, model, SETTINGS)
            assert cache.get_seq_length() == 40
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
            assert cache.get_seq_length() == 41
    held = caches["planned"]
    assert held.nbytes() == held.plan.bytes_at(41, 2)


def test_a_layer_that_reads_another_layers_keys_is_not_filled() -> None:
    config = Gemma3nTextConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
        vocab_size=96, pad_token_id=0, max_position_embeddings=256, head_dim=8, sliding_window=16,
        num_kv_shared_layers=1, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, laurel_rank=4,
        altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = planned(model)
    with torch.inference_mode():
        fill(cache, model, SETTINGS)
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    assert cache.get_seq_length() == 41


def test_a_run_says_what_it_took() -> None:
    model = tiny_model("llama")
    run = time_decode(model, "PlanCache", lambda: planned(model), 123, SETTINGS)
    assert run.timing.repeats == 3
    assert run.tokens_per_second == pytest.approx(2 / run.timing.median_seconds)
    assert (run.cache, run.batch, run.cache_bytes, run.reason) == ("PlanCache", 2, 123, None)
    assert run.peak_bytes is not None


def test_steps_go_on_from_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    caches: list[DynamicCache] = []

    def make() -> DynamicCache:
        caches.append(DynamicCache(config=model.config))
        return caches[-1]

    time_decode(model, "DynamicCache", make, 1, SETTINGS)
    assert caches[0].get_seq_length() == SETTINGS.tokens_held


def test_a_full_device_is_out_of_memory_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode_step, "fill", full)
    model = tiny_model("llama")
    with pytest.raises(OutOfMemory, match="2 sequences of 40 tokens do not fit cpu"):
        time_decode(model, "DynamicCache", lambda: DynamicCache(config=model.config), 1, SETTINGS)


@pytest.mark.parametrize(
    ("name", "positions", "tabled"), [("gpt2", 65, True), ("gpt2", 64, False), ("llama", 999, False)]
)
def test_a_table_of_positions_is_known(name: str, positions: int, tabled: bool) -> None:
    assert name in TINY
    assert lacks_positions(tiny_model(name), positions) is tabled
