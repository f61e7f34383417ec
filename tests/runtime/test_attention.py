"""Does one forward read what token-by-token decoding reads, and is the model left as it was?

The truth is a cache that the test writes itself: it keeps everything exact, and hands out a history that it rounds in
NumPy by the design's formulas, step by step.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch
import transformers
from tiny import MIXTURES, TINY, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvprof.errors import KvprofError, Mismatch, UnsupportedAttention
from kvprof.models.inventory import take_inventory
from kvprof.records.document import ModelInfo
from kvprof.records.plan import BitPlan, LayerPlan, Quantizer, SkippedLayer, TensorPlan, Window, layer_plan
from kvprof.runtime.attention import patch as interception
from kvprof.runtime.attention import reference as attention
from kvprof.runtime.attention.reference import decoding_reads

WRITTEN_OUT = ("gptj", "codegen", "bloom", "falcon-mqa", "falcon-mha", "falcon-grouped", "mpt")
UNSUPPORTED = "xglm"
FULL = TensorPlan(bits=16, group_size=32, axis="token")
SEED = 5


def per_channel(bits: int, group_size: int = 8, **more: Any) -> TensorPlan:
    return TensorPlan(bits=bits, group_size=group_size, axis="channel", **more)


def per_token(bits: int, group_size: int = 8, **more: Any) -> TensorPlan:
    return TensorPlan(bits=bits, group_size=group_size, axis="token", **more)


def rotated(bits: int, head_dim: int = 8, **more: Any) -> TensorPlan:
    return TensorPlan(scheme="rotated", bits=bits, group_size=head_dim, axis="token", **more)


def plan_for(model: PreTrainedModel, key: TensorPlan, value: TensorPlan, sinks: int = 0, recent: int = 0) -> BitPlan:
    """Give these formats to every layer that a plan of the model must cover."""
    geometry = take_inventory(model.config).geometry
    return BitPlan(
        model=ModelInfo(num_layers=geometry.num_layers),
        quantizer=Quantizer(rotation_seed=SEED),
        window=Window(sink_tokens=sinks, recent_tokens=recent),
        geometry=geometry,
        layers=tuple(layer_plan(layer.layer, key, value, layer.is_latent) for layer in geometry.planned),
        skipped=tuple(SkippedLayer(layer=at.layer, reason=at.skipped) for at in geometry.layers if at.skipped),
    )


def precise_model(name: str) -> PreTrainedModel:
    """A tiny model in float64, so that no code is a toss-up between two ways to add."""
    model = tiny_model(name).double()
    if name in MIXTURES:
        model.set_experts_implementation("eager")  # the grouped product of experts knows no float64
    return model


def some_ids(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(1, 96, (batch, tokens), generator=torch.Generator().manual_seed(3))


def round_group(x: np.ndarray, bits: int, clip: str) -> np.ndarray:
    """Round one group of numbers with one float16 scale and zero."""
    low, high = x.min(), x.max()
    best, least = x, np.inf
    for step in range(9 if clip == "mse" else 1):
        fraction = 1 - 0.05 * step
        middle, reach = (low + high) / 2, (high - low) / 2
        bottom, top = (low, high) if step == 0 else (middle - fraction * reach, middle + fraction * reach)
        scale, zero = float(np.float16((top - bottom) / (2**bits - 1))), float(np.float16(bottom))
        codes = np.clip(np.round((x - zero) / scale), 0, 2**bits - 1) if scale else np.zeros_like(x)
        restored = codes * scale + zero
        if (error := np.sum((restored - x) ** 2)) < least:
            best, least = restored, error
    return best


@functools.cache
def normal_levels(bits: int) -> np.ndarray:
    """Levels that are the means of their own cells, found by numerical integration."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def off_centre(levels: np.ndarray) -> np.ndarray:
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        cells = list(itertools.pairwise(edges))
        mass = [scipy.integrate.quad(density, *cell, epsabs=1e-13)[0] for cell in cells]
        moment = [scipy.integrate.quad(lambda x: x * density(x), *cell, epsabs=1e-13)[0] for cell in cells]
        return levels - np.array(moment) / np.array(mass)

    start = scipy.stats.norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    return scipy.optimize.root(off_centre, start, tol=1e-12).x


def round_rotated(x: np.ndarray, bits: int) -> np.ndarray:
    """Round one head vector in the rotated basis."""
    head_dim = len(x)
    signs = torch.randint(0, 2, (head_dim,), generator=torch.Generator().manual_seed(SEED)).numpy() * 2 - 1
    hadamard = scipy.linalg.hadamard(head_dim) / np.sqrt(head_dim)
    y = hadamard @ (signs * x)
    scale = float(np.float16(np.sqrt(np.mean(y**2))))
    nearest = np.abs(y[:, None] / scale - normal_levels(bits)).argmin(axis=1)
    return signs * (hadamard @ (normal_levels(bits)[nearest] * scale))


@functools.cache
def round_unit(numbers: bytes, shape: tuple[int, ...], form: TensorPlan) -> np.ndarray:
    """Round what is quantized at once: (group_size, D) for axis channel, (D,) for axis token."""
    x = np.frombuffer(numbers).reshape(shape)
    if form.scheme == "rotated":
        return round_rotated(x, form.bits)
    if form.axis == "channel":
        return np.stack([round_group(column, form.bits, form.clip) for column in x.T], axis=1)
    starts = range(0, len(x), form.group_size)
    return np.concatenate([round_group(x[at : at + form.group_size], form.bits, form.clip) for at in starts])


def history(exact: Tensor, before: int, form: TensorPlan, window: Window) -> Tensor:
    """What a query reads that arrives after `before` tokens: (1, H, T, D), of which the first `before` are history."""
    if form.bits == 16:
        return exact
    states = exact.detach().double().numpy().copy()
    recent = max(window.recent_tokens, -(-round(form.recent_fraction * 1000) * before // 1000))
    size = form.group_size if form.axis == "channel" else 1
    for start in range(window.sink_tokens, before, size):
        last = start + size - 1
        if before - 1 - last < recent:  # tokens that follow its last one
            break
        for head in range(states.shape[1]):
            unit = states[0, head, start : last + 1] if size > 1 or form.axis == "channel" else states[0, head, start]
            restored = round_unit(unit.tobytes(), unit.shape, form)
            states[0, head, start : last + 1] = restored
    return torch.from_numpy(states).to(exact.dtype)


class Everything(DynamicLayer):
    """Every token, of a layer that slides too: the model's own mask hides, by position, those outside its window."""

    is_sliding = True


class NaiveCache(DynamicCache):
    """Keeps everything exact; hands out the history rounded anew at each step."""

    def __init__(self, model: PreTrainedModel, plan: BitPlan) -> None:
        super().__init__(config=model.config)
        self.plan = plan
        self.plans = {entry.layer: entry for entry in plan.layers}
        for index in self.plans:
            if self.layers[index].is_sliding:
                self.layers[index] = Everything()

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key, value, layer_idx, *args, **kwargs)
        if layer_idx not in self.plans:
            return keys, values
        entry, before = self.plans[layer_idx], keys.shape[2] - key.shape[2]
        if self.plan.window.own_token_stored:
            before = keys.shape[2]
        return (
            history(keys, before, entry.key, self.plan.window),
            history(values, before, entry.value, self.plan.window),
        )


@torch.no_grad()
def token_by_token(model: PreTrainedModel, plan: BitPlan, ids: Tensor) -> Tensor:
    cache = NaiveCache(model, plan)
    steps = [model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(ids.shape[1])]
    return torch.cat(steps, dim=1)


@torch.no_grad()
def in_one_forward(model: PreTrainedModel, plan: BitPlan, ids: Tensor, **more: Any) -> Tensor:
    with decoding_reads(model, plan):
        return model(ids, **more).logits


def assert_same_reads(
    model: PreTrainedModel, plan: BitPlan, monkeypatch: pytest.MonkeyPatch, tokens: int = 44, use_cache: bool = False
) -> None:
    ids = some_ids(tokens)
    expected = token_by_token(model, plan, ids)
    for queries_at_once in (7, 256):
        monkeypatch.setattr(attention, "QUERIES_AT_ONCE", queries_at_once)
        torch.testing.assert_close(in_one_forward(model, plan, ids, use_cache=use_cache), expected, rtol=0, atol=1e-4)
    own = model(ids).logits
    assert (own - expected).abs().max() > 1e-2, "the plan changed next to nothing: a test of nothing"


FORMATS = {
    "int1-int1": (per_channel(1), per_token(1)),
    "int2-int4": (per_channel(2), per_token(4)),
    "int3-int2-groups-of-16": (per_channel(3, 16), per_token(2, 16)),
    "int4-int3-short-last-group": (per_channel(4, 5), per_token(3, 5)),
    "both-per-token": (per_token(2), per_token(3, 4)),
    "both-per-channel": (per_channel(2, 16), per_channel(2, 8)),
    "axes-swapped": (per_token(2), per_channel(2)),
    "clipped": (per_channel(2, clip="mse"), per_token(3, clip="mse")),
    "keys-only": (per_channel(2), FULL),
    "values-only": (FULL, per_token(2)),
    "fraction-of-keys": (per_channel(2, recent_fraction=0.3), per_token(2)),
    "fraction-of-values": (per_channel(2), per_token(2, recent_fraction=0.3)),
    "fraction-of-both": (per_token(2, recent_fraction=0.3), per_token(2, recent_fraction=0.75)),
    "rotated": (rotated(2), rotated(3)),
    "rotated-1-and-4": (rotated(1), rotated(4)),
    "mixed-schemes": (per_channel(3), rotated(2)),
    "mixed-schemes-swapped": (rotated(3), per_token(1)),
}
WINDOWS = ((0, 0), (4, 0), (2, 5), (0, 20), (3, 20))


@pytest.mark.parametrize(("sinks", "recent"), WINDOWS)
@pytest.mark.parametrize("formats", FORMATS)
def test_one_forward_reads_what_decoding_reads(
    formats: str, sinks: int, recent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = precise_model("llama")
    assert_same_reads(model, plan_for(model, *FORMATS[formats], sinks, recent), monkeypatch)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_architecture_reads_what_decoding_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = precise_model(name)
    assert_same_reads(model, plan_for(model, per_channel(2), per_token(2), 2, 5), monkeypatch)


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 0), (0, 1), (2, 5)])
@pytest.mark.parametrize("formats", ["both-per-token", "int2-int4", "fraction-of-values", "rotated", "values-only"])
def test_an_own_token_is_read_as_stored_where_the_runtime_stores_it_first(
    formats: str, sinks: int, recent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = precise_model("llama")
    plan = plan_for(model, *FORMATS[formats], sinks, recent)
    stored = plan.model_copy(update={"window": plan.window.model_copy(update={"own_token_stored": True})})
    assert_same_reads(model, stored, monkeypatch)


@pytest.mark.parametrize("name", ["llama-mha", "llama-mqa", "gemma2", "gemma3", "gpt-oss", "qwen3"])
def test_rotated_keys_and_a_fraction_of_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = precise_model(name)
    head_dim = take_inventory(model.config).geometry.planned[0].key_head_dim
    plan = plan_for(model, rotated(3, head_dim), per_token(2, recent_fraction=0.3), 1, 3)
    assert_same_reads(model, plan, monkeypatch, use_cache=True)


def test_eight_bits_change_little_and_still_what_they_should() -> None:
    model, ids = precise_model("llama"), some_ids(44)
    plan = plan_for(model, per_channel(8), per_token(8), 1, 2)
    found = in_one_forward(model, plan, ids)
    torch.testing.assert_close(found, token_by_token(model, plan, ids), rtol=0, atol=1e-6)
    assert 1e-5 < (found - model(ids).logits).abs().max() < 1


def test_more_queries_than_are_held_at_once() -> None:
    model, ids = precise_model("llama"), some_ids(attention.QUERIES_AT_ONCE + 70)
    plan = plan_for(model, per_channel(2, 16), per_token(2), 4, 20)
    torch.testing.assert_close(in_one_forward(model, plan, ids), token_by_token(model, plan, ids), rtol=0, atol=1e-4)


def test_layers_may_have_different_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    model = precise_model("llama")
    plan = plan_for(model, per_channel(1), per_token(1), 1, 4)
    other = LayerPlan(layer=1, key=rotated(2), value=FULL)
    assert_same_reads(model, plan.model_copy(update={"layers": (plan.layers[0], other)}), monkeypatch)


def test_layers_that_share_keys_read_what_their_maker_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Gemma3nTextConfig(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        pad_token_id=0,
        head_dim=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3,
        sliding_window=16,
        intermediate_size=[48] * 6,
        activation_sparsity_pattern=[0.0] * 6,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
        laurel_rank=4,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.1)
    assert_same_reads(model, plan_for(model, per_channel(3), per_token(3), 2, 5), monkeypatch)


def test_padding_on_the_right_changes_no_logit() -> None:
    model, ids = precise_model("llama"), some_ids(44, batch=2)
    plan = plan_for(model, per_channel(2), per_token(2), 2, 5)
    mask = torch.ones_like(ids)
    mask[1, 23:] = 0
    both = in_one_forward(model, plan, ids, attention_mask=mask)
    torch.testing.assert_close(both[:1], in_one_forward(model, plan, ids[:1]))
    torch.testing.assert_close(both[1:, :23], in_one_forward(model, plan, ids[1:, :23]))


@pytest.mark.parametrize("own", ["eager", "sdpa", "flex_attention"])
def test_reads_do_not_depend_on_the_models_own_implementation(own: str) -> None:
    model, ids = precise_model("llama"), some_ids(30)
    plan = plan_for(model, per_channel(2), per_token(2), 2, 5)
    expected = in_one_forward(model, plan, ids)
    model.set_attn_implementation(own)
    torch.testing.assert_close(in_one_forward(model, plan, ids), expected, rtol=0, atol=1e-5)


def test_a_half_precision_model_reads_in_half_precision() -> None:
    model, ids = tiny_model("llama").to(torch.bfloat16), some_ids(44)
    logits = in_one_forward(model, plan_for(model, per_channel(4), per_token(4), 2, 5), ids)
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_plan_of_16_bits_leaves_every_logit(name: str) -> None:
    model, ids = tiny_model(name), some_ids(44)
    found = in_one_forward(model, plan_for(model, FULL, FULL), ids)
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WRITTEN_OUT)
@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_attention_that_is_written_out_is_left_as_found(name: str, own: str) -> None:
    model, ids = tiny_model(name), some_ids(44, batch=2)
    if own == "sdpa" and not model._supports_sdpa:
        pytest.skip("its attention is written out in one way alone")
    model.config._attn_implementation = own
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    before, attributes = model(ids, attention_mask=mask).logits, [set(vars(part)) for part in model.modules()]
    plan = plan_for(model, per_channel(2), per_token(2), 2, 5)
    changed = in_one_forward(model, plan, ids, attention_mask=mask)
    assert (changed - before)[0].abs().max() > 0.01
    torch.testing.assert_close(changed[1:, :30], in_one_forward(model, plan, ids[1:, :30]))
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert [set(vars(part)) for part in model.modules()] == attributes
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_of_two_readers_of_written_out_attention_the_inner_one_counts(name: str) -> None:
    model, ids = tiny_model(name), some_ids(30)
    coarse, full = plan_for(model, per_channel(1), per_token(1), 1, 4), plan_for(model, FULL, FULL)
    with decoding_reads(model, coarse):
        outside = model(ids).logits
        with decoding_reads(model, full):
            torch.testing.assert_close(model(ids).logits, in_one_forward(model, full, ids))
        assert torch.equal(model(ids).logits, outside)


def test_attention_that_cannot_be_replaced_is_refused() -> None:
    model = tiny_model(UNSUPPORTED)
    with pytest.raises(UnsupportedAttention, match="attends in a way of its own"):
        in_one_forward(model, plan_for(model, FULL, FULL), some_ids(44))


def test_attention_that_is_never_reached_is_noticed_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(UNSUPPORTED)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: True)
    for decoder in model.children():
        if isinstance(decoder, PreTrainedModel):
            monkeypatch.setattr(type(decoder), "_can_set_attn_implementation", lambda *_: True)
    with pytest.raises(UnsupportedAttention, match="layer 0 of"):
        in_one_forward(model, plan_for(model, per_channel(2), per_token(2)), some_ids(9))


def test_a_forward_that_goes_on_from_a_cache_is_refused() -> None:
    model, ids = tiny_model("llama"), some_ids(12)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(KvprofError, match="4 queries came with 16 keys"):
        in_one_forward(model, plan_for(model, FULL, FULL), ids[:, :4], past_key_values=cache)


def test_sparse_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedAttention, match="sparse"):
        in_one_forward(model, plan_for(model, FULL, FULL), some_ids(9), block_indices=torch.zeros(1))


def test_a_plan_of_another_model_is_refused() -> None:
    plan = plan_for(tiny_model("llama"), per_channel(2), per_token(2))
    with pytest.raises(Mismatch, match="key heads of 16"):
        in_one_forward(tiny_model("qwen3"), plan, some_ids(9))
    more = plan.model_copy(update={"model": ModelInfo(num_layers=3)})
    with pytest.raises(Mismatch, match="it has 3 layers"), decoding_reads(tiny_model("llama"), more):
        pass


def state(model: PreTrainedModel) -> dict[str, Any]:
    """What a `with` could leave behind."""
    found = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        found[name] = (getattr(config, "_attn_implementation", None), len(module._forward_hooks), set(vars(module)))
    found["active"] = dict(interception._active)
    return found


def test_the_model_is_left_as_it_was() -> None:
    model, ids = tiny_model("llama"), some_ids(40)
    model.set_attn_implementation("eager")
    first, second = (plan_for(model, per_channel(bits), per_token(bits)) for bits in (2, 3))
    before, own = state(model), model(ids).logits
    alone = [in_one_forward(model, plan, ids) for plan in (first, second)]
    assert state(model) == before
    with decoding_reads(model, first):
        within = state(model)
        with decoding_reads(model, second):
            torch.testing.assert_close(model(ids).logits, alone[1], rtol=0, atol=0)
        assert state(model) == within
        torch.testing.assert_close(model(ids).logits, alone[0], rtol=0, atol=0)
    assert state(model) == before
    torch.testing.assert_close(model(ids).logits, own, rtol=0, atol=0)


def test_two_models_at_once_each_read_their_own_plan() -> None:
    ids = some_ids(40)
    models = tiny_model("llama"), tiny_model("qwen2")
    plans = [plan_for(model, per_channel(bits), per_token(bits)) for model, bits in zip(models, (2, 3), strict=True)]
    alone = [in_one_forward(model, plan, ids) for model, plan in zip(models, plans, strict=True)]
    with decoding_reads(models[0], plans[0]), decoding_reads(models[1], plans[1]):
        for model, expected in zip(models, alone, strict=True):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_after_an_exception(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error("halfway")

    model, ids = tiny_model("gpt-oss"), some_ids(40)
    plan = plan_for(model, per_channel(2), per_token(2))
    before = state(model)
    monkeypatch.setattr(attention, "fake_quantize", fail)
    with pytest.raises(error, match="halfway"), decoding_reads(model, plan):
        in_one_forward(model, plan, ids)
    assert state(model) == before


def tiny_multimodal() -> PreTrainedModel:
    text = TINY["llama"]()
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    return model


def test_the_decoder_in_a_multimodal_model_reads_the_plan_and_the_rest_is_left_alone() -> None:
    model, ids = tiny_multimodal(), some_ids(40) % 90 + 1
    plan = plan_for(model, per_channel(1), per_token(1))
    before, own = state(model), model(ids).logits
    with decoding_reads(model, plan):
        assert model.config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
        assert (model(ids).logits - own).abs().max() > 1e-4
    assert state(model) == before
    assert model.config.text_config._attn_implementation == "eager"
    torch.testing.assert_close(in_one_forward(model, plan_for(model, FULL, FULL), ids), own, rtol=0, atol=1e-5)


def test_a_gradient_passes_straight_through_the_rounding() -> None:
    model, ids = precise_model("llama"), some_ids(40)
    weight = model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)

    def gradient(plan: BitPlan | None) -> Tensor:
        if plan is None:
            loss = model(ids, labels=ids).loss
            return torch.autograd.grad(loss, weight)[0]
        with decoding_reads(model, plan):
            return torch.autograd.grad(model(ids, labels=ids).loss, weight)[0]

    own = gradient(None)
    torch.testing.assert_close(gradient(plan_for(model, FULL, FULL)), own)
    fine = gradient(plan_for(model, per_channel(8), per_token(8)))
    assert 0 < float((fine - own).norm() / own.norm()) < 0.05
    coarse = plan_for(model, per_channel(2), per_token(2))
    with decoding_reads(model, coarse):
        logits = model(ids).logits
    torch.testing.assert_close(logits.detach(), in_one_forward(model, coarse, ids), rtol=0, atol=1e-12)
