"""Every way in which a model uses a cache.

In 16 bits the truth is DynamicCache; in fewer it is a slow cache that keeps everything in full precision and rounds all
of it anew at each step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY
from tiny_plans import FULL, MIXED, UNUSUAL, build, naive_cache, plan_for, prompt, step
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvprof.errors import CacheError, Mismatch
from kvprof.runtime.cache import PlanCache

PLANNED = sorted(set(TINY) - {"mistral-sliding"})  # every layer of that one slides: there is nothing to plan
SLIDING = ("gemma2", "gemma3", "gpt-oss")


def caches(model: PreTrainedModel, formats: list[tuple[str, str]], fraction: float = 0.0) -> tuple[PlanCache, Cache]:
    """A plan's cache, and what is true of it."""
    plan = plan_for(model, formats, fraction=fraction)
    return PlanCache.from_plan(plan, model), (
        DynamicCache(config=model.config) if formats == FULL else naive_cache(plan, model)
    )


def generate(model: PreTrainedModel, ids: Tensor, cache: Cache, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return the ids that a model writes, and the logits that it chose them by."""
    usual = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "use_cache": True}
    torch.manual_seed(0)
    written = model.generate(
        ids, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **usual | settings
    )
    return written.sequences, torch.stack(written.logits)


def assert_as_planned(cache: PlanCache, batch: int) -> None:
    assert cache.nbytes() == cache.plan.bytes_at(cache.get_seq_length(), batch)


both = pytest.mark.parametrize("formats", [FULL, MIXED], ids=["16 bits", "few bits"])


# Every architecture


@pytest.mark.parametrize("name", PLANNED)
def test_16_bits_give_the_logits_of_a_dynamic_cache(name: str) -> None:
    model = build(name)
    planned, dynamic = caches(model, FULL)
    for ids in torch.split(prompt(31, 2), [12, 1, 9, 1, 8], dim=1):
        assert torch.equal(step(model, ids, planned), step(model, ids, dynamic))


@pytest.mark.parametrize("name", PLANNED)
def test_few_bits_generate_as_if_all_were_rounded_anew(name: str) -> None:
    model = build(name)
    planned, naive = caches(model, MIXED)
    ids, logits = generate(model, prompt(20, 2), planned)
    expected_ids, expected_logits = generate(model, prompt(20, 2), naive)
    assert ids.shape == (2, 44)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(logits, expected_logits)
    assert planned.get_seq_length() == 43
    if name not in SLIDING:
        assert_as_planned(planned, batch=2)


def test_few_bits_are_not_16() -> None:
    model = build("llama")
    few, full = (generate(model, prompt(20), caches(model, formats)[0])[1] for formats in (MIXED, FULL))
    assert not torch.allclose(few, full, atol=0.01)


# Every way to choose tokens


@both
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True, "eos_token_id": 7},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.3},
        {"prefill_chunk_size": 8},
    ],
    ids=["sampling", "several samples", "beams", "beams that end", "sampled beams", "penalty", "chunked prefill"],
)
def test_tokens_are_chosen_as_from_the_true_cache(formats: list[tuple[str, str]], settings: dict[str, Any]) -> None:
    model = build("llama", max_position_embeddings=256)
    planned, true = caches(model, formats, fraction=0.2)
    ids, logits = generate(model, prompt(20, 2), planned, **settings)
    expected_ids, expected_logits = generate(model, prompt(20, 2), true, **settings)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(logits, expected_logits)
    batch = 2 * max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1))
    assert_as_planned(planned, batch)


@both
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_left_padded_batches(name: str, formats: list[tuple[str, str]]) -> None:
    model = build(name)
    ids, mask = prompt(20, 3), torch.ones(3, 20, dtype=torch.long)
    for row, padding in enumerate((0, 5, 13)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    planned, true = caches(model, formats)
    found = generate(model, ids, planned, attention_mask=mask)
    expected = generate(model, ids, true, attention_mask=mask)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@both
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_chat_goes_on_in_the_same_cache(name: str, formats: list[tuple[str, str]]) -> None:
    model = build(name, max_position_embeddings=256)
    planned, true = caches(model, formats)
    talk = prompt(15, 2)
    for turn in range(3):
        talk = torch.cat([talk, prompt(9, 2, seed=turn + 10)], dim=1)
        found, expected = (generate(model, talk, cache) for cache in (planned, true))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        talk = found[0]
    assert planned.get_seq_length() == talk.shape[1] - 1


@both
@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("way", ["prompt lookup", "an assistant", "a sampling assistant"])
def test_candidates_of_several_tokens_are_taken_back(
    name: str, formats: list[tuple[str, str]], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, max_position_embeddings=256)
    settings: dict[str, Any] = {"prompt_lookup_num_tokens": 6}
    if way != "prompt lookup":
        assistant = build(name, seed=3, max_position_embeddings=256)
        assistant.generation_config.update(num_assistant_tokens=5, assistant_confidence_threshold=0)
        settings = {"assistant_model": assistant}
    settings |= {"max_new_tokens": 60, "do_sample": way == "a sampling assistant"}
    repeated = prompt(10).repeat(1, 3)
    planned, true = caches(model, formats)
    taken_back: list[int] = []
    crop = planned.crop
    monkeypatch.setattr(planned, "crop", lambda count: (taken_back.append(-count), crop(count)))
    found, expected = (generate(model, repeated, cache, **settings) for cache in (planned, true))
    assert max(taken_back) > 1
    assert found[0].shape[1] == 90
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    if name == "llama":
        assert_as_planned(planned, batch=1)
    if formats == FULL and way != "a sampling assistant":
        assert torch.equal(found[0], generate(model, repeated, DynamicCache(config=model.config), max_new_tokens=60)[0])


@pytest.mark.parametrize("name", ["bamba", "falcon-h1"])
def test_candidates_for_a_recurrent_model_are_refused_in_words(name: str) -> None:
    model = build(name)
    with pytest.raises((CacheError, ValueError), match=r"cannot go back|stateful|not supported"):
        generate(model, prompt(10).repeat(1, 3), caches(model, MIXED)[0], prompt_lookup_num_tokens=6)


def test_a_cache_of_another_model_is_refused_by_the_first_token() -> None:
    cache = caches(build("llama"), MIXED)[0]
    with pytest.raises(Mismatch, match="layer 0 brings keys of 2 heads of 16"):
        generate(build("qwen3"), prompt(10), cache)


# The state that is left


@pytest.mark.parametrize("name", ["llama", "falcon-grouped", "falcon-h1", "gemma4"])
def test_a_prompt_in_pieces_leaves_the_lengths_of_a_prompt_at_once(name: str) -> None:
    model = build(name)
    plan = plan_for(model, fraction=0.1)
    whole, pieces = (PlanCache.from_plan(plan, model) for _ in range(2))
    step(model, prompt(50, 2), whole)
    for ids in torch.split(prompt(50, 2), [3, 30, 1, 16], dim=1):
        step(model, ids, pieces)
    assert pieces.get_seq_length() == whole.get_seq_length() == 50
    assert pieces.nbytes() == whole.nbytes()


def test_a_prompt_in_pieces_of_the_first_layer_leaves_the_same_cache() -> None:
    """Whose keys and values depend on no reading: what is held then depends on the tokens alone."""
    model = build("llama", num_hidden_layers=1)
    plan = plan_for(model, fraction=0.1)
    whole, pieces, one_by_one = (PlanCache.from_plan(plan, model) for _ in range(3))
    for cache, sizes in ((whole, [50]), (pieces, [3, 30, 1, 16]), (one_by_one, [1] * 50)):
        for ids in torch.split(prompt(50, 2), sizes, dim=1):
            step(model, ids, cache)
    probe = prompt(4, 2, seed=9)
    expected = step(model, probe, whole)
    torch.testing.assert_close(step(model, probe, pieces), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(step(model, probe, one_by_one), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_beams_carry_every_kind_of_layer(name: str) -> None:
    model = build(name)
    planned, dynamic = caches(model, FULL)
    found, expected = (generate(model, prompt(20, 2), cache, num_beams=3) for cache in (planned, dynamic))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
