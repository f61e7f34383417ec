"""Estimates against counts by hand, with a device whose speed is given."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, tiny_model
from transformers import Gemma3TextConfig, GPT2Config

from kvprof.models import costs

CPU = torch.device("cpu")


def run(written: tuple[int, ...] = (), backwards: float = 0, lengths: tuple[int, ...] = (512, 512), **passes: float):  # type: ignore[no-untyped-def]
    return costs.Run(lengths, costs.Passes(1 + backwards, backwards, **passes), torch.float32, CPU, False, 1, written)


@pytest.fixture(autouse=True)
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of a nanosecond for each weight that a few rows read, and for each number of a softmax; no overhead."""
    monkeypatch.setattr(costs, "_multiplications_a_second", lambda *_: 1e11)
    monkeypatch.setattr(costs, "_seconds_a_weight", lambda rows, *_: 1e-9)
    monkeypatch.setattr(costs, "_seconds_a_logit", lambda *_: 1e-9)
    monkeypatch.setattr(costs, "_seconds_a_call", lambda *_: 0.0)


def test_text_costs_a_reading_of_the_weights_and_a_draw_for_each_token_of_a_batch() -> None:
    counted = costs.costs_of(GPT2Config(n_embd=256, n_layer=8, n_head=8))
    estimate = costs.reckon(counted, run(written=(4, 4, 8)))
    read = 3 * 512 * counted.active * 1e-9
    drawn = (4 + 4 + 8) * 512 * 50257 * 7 * 1e-9
    cached, spread = 8 * 2 * 256, 8 * 2 * 256  # elements a token; each head has keys of its own
    moved = (4 + 4 + 8) * 512 * 256 * (2 * cached + 2 * spread) * 1e-9
    assert estimate.writing_seconds == pytest.approx(read + drawn + moved)
    assert costs.reckon(counted, run()).writing_seconds is None


def test_small_models_take_the_time_of_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_seconds_a_call", lambda *_: 1e-5)
    monkeypatch.setattr(costs, "_seconds_a_weight", lambda *_: 0.0)
    counted = costs.costs_of(TINY["llama"]())
    modules = sum(not list(module.children()) for module in tiny_model("llama").modules())
    assert counted.modules == modules
    steps = costs.reckon(counted, run(written=(4,), lengths=(64,))).writing_seconds
    assert steps == pytest.approx(64 * 8 * modules * 1e-5, rel=0.01)


def test_a_large_head_is_read_for_sixteen_positions_at_a_time() -> None:
    config = Gemma3TextConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=262_144, head_dim=16, intermediate_size=64
    )
    counted = costs.costs_of(config)
    softmaxes = 1024 * 262_144 * 3 * 1e-9
    head = counted.head * (1024 / 16) * (2 + 1) * 1e-9
    found = costs.reckon(counted, run(backwards=1)).seconds
    assert found == pytest.approx(costs.STARTING_SECONDS + head + softmaxes, rel=0.1)


def test_the_logits_of_two_forwards_stand_in_memory_while_they_are_compared() -> None:
    counted = costs.costs_of(GPT2Config(n_embd=64, n_layer=2, n_head=2))
    one, two = (costs.reckon(counted, run(held=held)).memory_bytes for held in (1, 2))
    assert two - one == 512 * 50257 * 4


def test_a_checkpoint_of_another_dtype_stands_beside_what_is_made_of_it() -> None:
    counted = costs.costs_of(GPT2Config(n_embd=256, n_layer=2, n_head=2))
    passes, short = costs.Passes(1), (8,)
    cast, mapped = (
        costs.reckon(counted, costs.Run(short, passes, torch.bfloat16, CPU, False, 1, stored=stored)).memory_bytes
        for stored in (torch.float32, torch.bfloat16)
    )
    assert cast == counted.weights * (2 + 4) + costs.LIBRARY_BYTES
    assert counted.weights * 2 + costs.LIBRARY_BYTES <= mapped < cast


def test_the_cache_of_the_rows_is_counted_where_it_is_the_most() -> None:
    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16, vocab_size=96, n_positions=2048)
    counted = costs.costs_of(config)
    plain = costs.reckon(counted, run(lengths=(2048,))).memory_bytes
    rows = 16
    cache = rows * 2048 * 24 * 2 * 1024 * 4
    assert costs.reckon(counted, run(written=(rows,), lengths=(2048,))).memory_bytes == pytest.approx(
        4 * counted.weights + cache + costs.LIBRARY_BYTES, rel=0.001
    )
    assert cache > plain - 4 * counted.weights
