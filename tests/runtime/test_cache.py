"""PlanCache as an object: for which model, of which layers, how many bytes, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from handplans import bytes_within, tensors_within
from tiny_plans import FULL, MIXED, UNUSUAL, build, plan_for, prompt, step
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvprof.errors import CacheError, KvprofError, Mismatch
from kvprof.records.plan import BitPlan
from kvprof.runtime.cache import PlanCache
from kvprof.runtime.layers import RECORDED_TOKENS, planned_layer


def filled(model: PreTrainedModel, tokens: int = 40, batch: int = 1, **settings: Any) -> PlanCache:
    cache = PlanCache.from_plan(plan_for(model, **settings), model)
    step(model, prompt(tokens, batch), cache)
    return cache


def contents(cache: Cache) -> list[Tensor]:
    """Every tensor that a cache holds, copied."""
    return [x.clone() for layer in cache.layers for x in tensors_within(layer)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def promised(cache: PlanCache, batch: int = 1) -> int:
    return cache.plan.bytes_at(cache.get_seq_length(), batch)


# For which model


def test_a_plan_fits_the_model_that_it_was_made_for() -> None:
    model = build("llama")
    cache = PlanCache.from_plan(plan_for(model, fingerprint=True), model)
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == cache.nbytes() == 0
    assert len(cache) == 2


def test_other_weights_in_the_same_shape_are_another_model() -> None:
    plan = plan_for(build("llama"), fingerprint=True)
    with pytest.raises(Mismatch, match=r"fingerprint.*\n  Name its own model"):
        PlanCache.from_plan(plan, build("llama", seed=1))


@pytest.mark.parametrize("way", ["in place", "behind autograd's back", "exchanged"])
def test_a_model_finetuned_after_its_first_cache_is_another_model(way: str) -> None:
    model = build("llama")
    plan = plan_for(model, fingerprint=True)
    PlanCache.from_plan(plan, model)
    projection = model.model.layers[1].self_attn.v_proj
    if way == "in place":
        projection.weight.mul_(-1)
    elif way == "behind autograd's back":
        projection.weight.data.mul_(-1)
    else:
        projection.weight = torch.nn.Parameter(-projection.weight)
    with pytest.raises(Mismatch, match="fingerprint"):
        PlanCache.from_plan(plan, model)


@pytest.mark.parametrize("other", ["llama-mha", "qwen3", "gemma2"])
def test_another_shape_is_another_model(other: str) -> None:
    plan = plan_for(build("llama"))
    with pytest.raises(Mismatch, match="another model"):
        PlanCache.from_plan(plan, build(other))
    with pytest.raises(Mismatch):  # also where the plan says no more than how many layers there are
        PlanCache.from_plan(by_hand(plan), build("llama", num_hidden_layers=3))


def by_hand(plan: BitPlan) -> BitPlan:
    return plan.model_copy(update={"geometry": None, "skipped": None, "model": plan.model.model_copy()})


def test_a_plan_written_by_hand_needs_neither_geometry_nor_fingerprint() -> None:
    model = build("llama")
    plan = by_hand(plan_for(model))
    with pytest.raises(KvprofError):
        plan.bytes_at(40)
    cache = PlanCache.from_plan(plan, model)
    step(model, prompt(40, 2), cache)
    assert cache.nbytes() == cache.plan.bytes_at(40, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plan_of_a_float32_checkpoint_serves_the_model_in_half_precision(dtype: torch.dtype) -> None:
    plan = plan_for(build("llama"), fingerprint=True)
    model = build("llama", dtype=dtype)
    cache = PlanCache.from_plan(plan, model)
    step(model, prompt(40, 2), cache)
    assert {x.dtype for x in planned_layer(cache.layers[0]).key.recent.blocks} == {dtype}
    assert cache.nbytes() == cache.plan.bytes_at(40, 2) < plan.bytes_at(40, 2)


# Of which layers

OWN = {
    "llama": ["Planned", "Planned"],
    "gemma2": ["DynamicSlidingWindow", "Planned"],
    "gemma3": ["DynamicSlidingWindow", "Planned"],
    "gpt-oss": ["DynamicSlidingWindow", "Planned"],
    "falcon-h1": ["PlannedHybrid", "PlannedHybrid"],
    "bamba": ["LinearAttention", "Planned", "LinearAttention"],
    "jamba": ["LinearAttention", "Planned"] * 2,
    "qwen3-next": ["LinearAttention"] * 3 + ["Planned"],
    "lfm2": ["LinearAttention", "Planned", "LinearAttention"],
    "gemma3n": ["DynamicSlidingWindow", "Planned", "DynamicSlidingWindow", "Dummy"],
    "gemma4": ["DynamicSlidingWindow", "Planned", "Dummy", "Dummy"],
}


@pytest.mark.parametrize("name", OWN)
def test_layers_that_the_plan_skips_are_those_of_transformers(name: str) -> None:
    model = build(name)
    cache = PlanCache.from_plan(plan_for(model, layers="full"), model)
    assert [type(layer).__name__ for layer in cache.layers] == [kind + "Layer" for kind in OWN[name]]
    for layer, own in zip(cache.layers, DynamicCache(config=model.config).layers, strict=True):
        assert planned_layer(layer) is not None or type(layer) is type(own)


@pytest.mark.parametrize("name", OWN)
def test_layers_that_slide_are_the_plans_own_where_it_covers_them(name: str) -> None:
    model = build(name)
    cache = PlanCache.from_plan(plan_for(model), model)
    expected = [kind.replace("DynamicSlidingWindow", "Planned") + "Layer" for kind in OWN[name]]
    assert [type(layer).__name__ for layer in cache.layers] == expected
    assert cache.is_sliding == DynamicCache(config=model.config).is_sliding


def test_a_model_of_sliding_layers_alone_has_no_plan_of_full_ones() -> None:
    with pytest.raises(ValueError, match="layers is empty"):
        plan_for(build("mistral-sliding"), layers="full")


@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_unusual_layers_in_16_bits_give_the_logits_of_a_dynamic_cache(name: str) -> None:
    model = build(name)
    planned, dynamic = PlanCache.from_plan(plan_for(model, FULL), model), DynamicCache(config=model.config)
    for ids in torch.split(prompt(31, 2), [12, 1, 9, 1, 8], dim=1):
        assert torch.equal(step(model, ids, planned), step(model, ids, dynamic))


@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_unusual_layers_in_few_bits_generate(name: str) -> None:
    model = build(name)
    cache = PlanCache.from_plan(plan_for(model), model)
    ids = model.generate(prompt(20, 2), past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert ids.shape == (2, 32)
    assert cache.get_seq_length() == 31
    assert cache.nbytes() == promised(cache, batch=2)


# How many bytes


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_the_bytes_are_those_of_the_plan_after_every_token(fraction: float) -> None:
    model = build("llama")
    cache = PlanCache.from_plan(plan_for(model, fraction=fraction), model)
    for ids in torch.split(prompt(60, 3), [20, *[1] * 30, 10], dim=1):
        step(model, ids, cache)
        held = sum(bytes_within(layer) for layer in cache.layers)
        assert cache.nbytes() == cache.plan.bytes_at(cache.get_seq_length(), 3) == held


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
def test_a_sliding_layer_left_alone_counts_the_window_that_its_last_query_read(tokens: int) -> None:
    model = build("gemma3")
    cache = filled(model, tokens, layers="full")
    assert cache.nbytes() == cache.plan.bytes_at(tokens)
    held = sum(bytes_within(layer) for layer in cache.layers if not layer.is_sliding)
    held += sum(x.numel() * x.element_size() for x in (cache.layers[0].keys, cache.layers[0].values))
    token = 2 * 2 * 8 * 4  # keys and values, 2 KV heads of 8, float32; transformers has let the oldest go
    assert cache.nbytes() - held == (token if tokens >= 16 else 0)


def test_nothing_unpacked_outlives_a_step() -> None:
    model = build("llama")
    cache = filled(model, 200, batch=2)
    step(model, prompt(1, 2), cache)
    held = [x for layer in cache.layers for x in tensors_within(layer) if x.is_floating_point()]
    assert (
        max(x.shape[2] for x in held if x.ndim == 4 and x.dtype == torch.float32) <= 6 + 8
    )  # window, unfinished group


# What stays right


def test_a_copy_goes_its_own_way() -> None:
    """A prompt read once, for many continuations."""
    model = build("gemma3")
    prefix = filled(model)
    before = contents(prefix)
    copies = [copy.deepcopy(prefix) for _ in range(2)]
    logits = [step(model, prompt(9, seed=seed), cache) for seed, cache in enumerate(copies)]
    assert same(contents(prefix), before)
    for seed, expected in enumerate(logits):
        assert torch.equal(step(model, prompt(9, seed=seed), copy.deepcopy(prefix)), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-h1", "bamba", "inkling"])
def test_after_a_reset_the_cache_is_as_new(name: str) -> None:
    model = build(name)
    cache, fresh = filled(model), PlanCache.from_plan(plan_for(model), model)
    cache.activate_past_recording()
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == 0
    for ids in torch.split(prompt(50, 3), [30, 20], dim=1):  # another batch
        assert torch.equal(step(model, ids, cache), step(model, ids, fresh))
    assert same(contents(cache), contents(fresh))


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-h1", "bamba", "inkling"])
def test_sequences_are_repeated_chosen_and_reordered(name: str) -> None:
    model = build(name)
    cache = filled(model, batch=2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))  # sequences 1, 0, 1
    assert cache.nbytes() == promised(cache, batch=3)
    alone = filled(model, batch=2)
    ids = prompt(5, 2, seed=3)
    expected = step(model, ids, alone)
    found = step(model, ids[[1, 0, 1]], cache)
    torch.testing.assert_close(found, expected[[1, 0, 1]])


def test_no_graph_is_kept_where_gradients_are_on() -> None:
    model = build("llama").requires_grad_(True)
    cache = PlanCache.from_plan(plan_for(model), model)
    for ids in torch.split(prompt(50), [30, 1, 19], dim=1):
        logits = model(ids, past_key_values=cache).logits
        assert not any(x.requires_grad for layer in cache.layers for x in tensors_within(layer))
    logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_a_cache_filled_in_inference_mode_serves_outside_of_it() -> None:
    model = build("llama").requires_grad_(True)
    cache, other = (PlanCache.from_plan(plan_for(model), model) for _ in range(2))
    with torch.inference_mode():
        model(prompt(30), past_key_values=cache)
    step(model, prompt(30), other)
    ids = prompt(9, seed=5)
    logits = model(ids, past_key_values=cache).logits
    assert torch.equal(logits, model(ids, past_key_values=other).logits)
    logits.sum().backward()


# What is refused


def test_another_number_of_sequences_is_refused_before_anything_changes() -> None:
    model = build("llama")
    cache = filled(model, batch=2)
    before = contents(cache)
    with pytest.raises(CacheError, match=r"3 sequences, the cache holds 2.\n  Call cache.reset\(\)"):
        step(model, prompt(1, 3), cache)
    assert same(contents(cache), before)
    step(model, prompt(1, 2), cache)


@pytest.mark.parametrize("tokens", [0, 40])
def test_other_heads_are_refused_before_anything_changes(tokens: int) -> None:
    model = build("llama")
    cache = filled(model, tokens) if tokens else PlanCache.from_plan(plan_for(model), model)
    before = contents(cache)
    for shape in ((1, 3, 1, 8), (1, 2, 1, 16)):
        with pytest.raises(Mismatch, match="the plan is for 2 heads of 8"):
            cache.update(torch.zeros(shape), torch.zeros(shape), 0)
    with pytest.raises(Mismatch):  # keys that fit, values that do not
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 4), 0)
    assert same(contents(cache), before)


def test_repeated_heads_that_differ_are_refused() -> None:
    """Falcon brings each KV head once for every query head; four heads that differ are another model's."""
    model = build("llama")
    cache = PlanCache.from_plan(plan_for(model), model)
    with pytest.raises(Mismatch, match="4 KV heads that differ"):
        cache.update(torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8), 0)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("count", [-20, 20])
def test_going_back_to_what_was_rounded_away_is_refused_before_anything_changes(count: int) -> None:
    model = build("llama")
    cache = filled(model)
    before = contents(cache)
    with pytest.raises(CacheError, match=r"from 40 to 20 tokens.*\n.*activate_past_recording\(\)"):
        cache.crop(count)
    assert same(contents(cache), before)


def test_a_layer_that_cannot_go_back_holds_all_others() -> None:
    """The second layer's values are still in full precision where the first layer's are not."""
    model = build("llama")
    cache = filled(model, tokens=10, formats=[("full", "full"), ("int2g4", "int2g4")])
    before = contents(cache)
    with pytest.raises(CacheError):
        cache.crop(-2)
    assert same(contents(cache), before)


@pytest.mark.parametrize("name", ["gemma3", "lfm2"])
def test_layers_that_keep_no_past_go_back_only_as_far_as_it_was_recorded(name: str) -> None:
    model = build(name)
    plan = plan_for(model, FULL)
    cache, never = (PlanCache.from_plan(plan, model) for _ in range(2))
    for each in (cache, never):
        step(model, prompt(40), each)
    before = contents(cache)
    with pytest.raises(CacheError, match="activate_past_recording"):
        cache.crop(-1)
    cache.crop(0)
    cache.activate_past_recording()
    with pytest.raises(CacheError, match="activate_past_recording"):
        cache.crop(-1)
    assert same(contents(cache), before)
    step(model, prompt(7, seed=2), cache)
    with pytest.raises(CacheError, match="from 47 to 39"):
        cache.crop(-8)
    cache.crop(-7)
    assert torch.equal(step(model, prompt(5, seed=3), cache), step(model, prompt(5, seed=3), never))


@pytest.mark.parametrize("name", ["falcon-h1", "bamba"])
def test_a_recurrent_state_never_goes_back(name: str) -> None:
    model = build(name)
    cache = PlanCache.from_plan(plan_for(model), model)
    cache.activate_past_recording()
    step(model, prompt(40), cache)
    before = contents(cache)
    with pytest.raises(CacheError, match="recurrent state, which cannot go back; nothing was changed"):
        cache.crop(-1)
    assert same(contents(cache), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4"])
def test_what_was_recorded_is_taken_back_without_a_trace(name: str) -> None:
    model = build(name)
    cache = filled(model)
    never = copy.deepcopy(cache)
    cache.activate_past_recording()
    for ids in torch.split(prompt(RECORDED_TOKENS, seed=2), [50, 1, RECORDED_TOKENS - 51], dim=1):
        step(model, ids, cache)
    cache.crop(-RECORDED_TOKENS)
    assert same(contents(cache), contents(never))
    assert cache.nbytes() == promised(cache)
    assert torch.equal(step(model, prompt(3), cache), step(model, prompt(3), never))


def test_a_crop_of_nothing_ends_the_waiting() -> None:
    model = build("llama")
    cache = PlanCache.from_plan(plan_for(model), model)
    cache.activate_past_recording()
    step(model, prompt(60), cache)
    assert cache.nbytes() > cache.plan.bytes_at(60)
    cache.crop(0)
    assert cache.nbytes() == cache.plan.bytes_at(60)


@pytest.mark.parametrize(("count", "left"), [(0, 7), (-1, 6), (-7, 0), (-9, 0), (3, 3), (7, 7), (99, 7)])
def test_a_negative_number_removes_and_a_positive_one_keeps(count: int, left: int) -> None:
    model = build("llama")
    cache = filled(model, tokens=7)  # all of it in the window
    cache.crop(count)
    assert cache.get_seq_length() == left
    assert cache.nbytes() == cache.plan.bytes_at(left)
    step(model, prompt(2), cache)


def test_offloading_is_refused() -> None:
    model = build("llama")
    with pytest.raises(CacheError, match="does not offload"):
        filled(model).offload(0)


def test_formats_of_these_tests_are_of_every_kind() -> None:
    assert {name[:3] for pair in MIXED for name in pair} == {"int", "rot", "ful"}
