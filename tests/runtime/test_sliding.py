"""Layers of a sliding window, or of attention chunks, in a PlanCache.

The truth is an attention of this file's own: it keeps every token in full precision, rounds by `reference.py`, and
hides by position itself what the window does not show. It is given the very numbers that the cache was given to round.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from handplans import bytes_within, tensor_plan
from reference import given_back
from tiny_plans import FULL, MIXED, plan_for
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvprof.models.inventory import take_inventory
from kvprof.records.document import ModelInfo
from kvprof.records.plan import BitPlan, LayerPlan, Quantizer, TensorPlan, Window
from kvprof.runtime.attention.reference import decoding_reads
from kvprof.runtime.cache import PlanCache
from kvprof.runtime.layers import planned_layer

VOCABULARY = 96
HEADS = (4, 2)
"""Query heads and KV heads."""
NAMES = ("Mistral", "Gemma2", "Gemma3Text", "GptOss", "Llama4Text")


def build(name: str, span: int, head_dim: int = 8, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a tiny model of two layers, of which the first shows so many tokens; of Mistral and Llama 4 both do."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS[0],
        "num_key_value_heads": HEADS[1],
        "head_dim": head_dim,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
    }
    if name == "Llama4Text":
        settings |= {"attention_chunk_size": span, "intermediate_size_mlp": 48, "num_local_experts": 2}
        settings |= {"no_rope_layers": [1, 1], "interleave_moe_layer_step": 2, "use_qk_norm": False}
    else:
        settings["sliding_window"] = span
    if name == "Gemma3Text":
        settings["layer_types"] = ["sliding_attention", "full_attention"]
    if name in ("Gemma2", "Gemma3Text"):
        settings["query_pre_attn_scalar"] = head_dim
    if name == "GptOss":
        settings |= {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter if parameter.ndim == 1 else 0))
            if parameter.ndim > 1:
                parameter.mul_(3)
    if name == "GptOss":
        model.set_experts_implementation("eager")
    return model.to(dtype).eval().requires_grad_(False)


def prompt(tokens: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def spans(model: PreTrainedModel) -> list[int | None]:
    """Return how many tokens each layer shows, as transformers' own cache has it."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]


def plan_of(
    model: PreTrainedModel, forms: list[tuple[TensorPlan, TensorPlan]], sinks: int = 0, recent: int = 0
) -> BitPlan:
    """Return a plan that covers every layer."""
    geometry = take_inventory(model.config).geometry
    assert [layer.window for layer in geometry.layers] == spans(model)
    layers = tuple(LayerPlan(layer=layer, key=key, value=value) for layer, (key, value) in enumerate(forms))
    return BitPlan(
        model=ModelInfo(num_layers=len(layers)),
        quantizer=Quantizer(),
        window=Window(sink_tokens=sinks, recent_tokens=recent),
        geometry=geometry,
        layers=layers,
    )


# The reference


class Attention:
    """Attends in float64 to every token ever seen, rounded as the plan says, those that a query does not see hidden."""

    def __init__(self, plan: BitPlan, spans: list[int | None], chunked: bool, padding: Tensor) -> None:
        self.plan = plan
        self.spans = spans
        self.chunked = chunked
        self.padding = padding
        self.given: dict[int, tuple[Tensor, Tensor]] = {}
        self.past = 0
        self.farthest = 0.0

    def history(self, exact_BHTD: Tensor, form: TensorPlan) -> np.ndarray:
        """Return what a cache that lets nothing go gives back of the tokens before this forward."""
        return given_back(exact_BHTD[:, :, : self.past].numpy(), form, self.plan.window, self.plan.quantizer)

    def hidden(self, layer: int, new: int, tokens: int) -> np.ndarray:
        """Return which keys, (B, 1, new, tokens), the queries do not see; chunks begin behind a sequence's padding."""
        padding = self.padding.numpy()[:, None, None, None]
        key = np.arange(tokens)[None, :] - padding
        query = self.past + np.arange(new)[:, None] - padding
        hidden = (key > query) | (key < 0)
        span = self.spans[layer]
        if span is not None:
            hidden |= key // span != query // span if self.chunked else key <= query - span
        return hidden

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        layer, new = module.layer_idx, query.shape[2]
        entry, (keys, values) = self.plan.layers[layer], self.given[layer]
        behind = slice(self.past, self.past + new)
        # The key and value that this run made itself are those of the other run, up to the last bits; padding aside.
        there = (torch.arange(self.past, self.past + new) >= self.padding[:, None])[:, None, :, None]
        for own, other in ((key, keys), (value, values)):
            self.farthest = max(self.farthest, float(((own[:, :, -new:] - other[:, :, behind]) * there).abs().max()))
        k, v = (
            np.concatenate([self.history(exact, form), own[:, :, -new:].numpy()], axis=2).repeat(
                query.shape[1] // key.shape[1], axis=1
            )
            for exact, form, own in ((keys, entry.key, key), (values, entry.value, value))
        )
        scores = query.numpy().astype(np.float64) @ k.swapaxes(-1, -2) * scaling
        if softcap is not None:
            scores = np.tanh(scores / softcap) * softcap
        scores = np.where(self.hidden(layer, new, k.shape[2]), -np.inf, scores)
        if s_aux is not None:  # a logit beside those of the tokens, of nothing
            extra = np.broadcast_to(s_aux.numpy()[None, :, None, None], (*scores.shape[:3], 1))
            scores = np.concatenate([scores, extra], axis=-1)
        with np.errstate(invalid="ignore"):  # a padded query sees nothing at all
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = np.nan_to_num(weights / weights.sum(-1, keepdims=True))
        out = weights[..., : k.shape[2]] @ v
        return torch.from_numpy(out.astype(np.float32)).transpose(1, 2).contiguous(), None


class Recording(PlanCache):
    """Keeps what each layer was given, (B, H, T, D) of keys and values, all of it."""

    given: dict[int, tuple[Tensor, Tensor]]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        old, new = self.given.get(layer_idx), (key_states, value_states)
        self.given[layer_idx] = new if old is None else tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextlib.contextmanager
def attending(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    own = model.config._attn_implementation
    AttentionInterface.register("by_hand", attention)
    model.config._attn_implementation = "by_hand"
    try:
        yield
    finally:
        model.config._attn_implementation = own


def compare(
    model: PreTrainedModel, plan: BitPlan, ids: Tensor, lengths: list[int], padding: Tensor | None = None
) -> float:
    """Read a text in pieces both ways; return the largest difference of any logit of a token that is no padding."""
    cache = Recording(plan, PlanCache.from_plan(plan, model).layers)
    cache.given = {}
    padding = torch.zeros(len(ids), dtype=torch.long) if padding is None else padding
    seen = (torch.arange(ids.shape[1]) >= padding[:, None]).long()
    own = Attention(plan, spans(model), "Llama4" in type(model).__name__, padding)
    past, found, wanted, tokens = DynamicCache(), [], [], 0
    for piece in torch.split(ids, lengths, dim=1):
        tokens += piece.shape[1]
        position = (seen.cumsum(1) - 1).clamp(min=0)[:, tokens - piece.shape[1] : tokens]
        mask = seen[:, :tokens] if bool(padding.any()) else None
        found.append(model(piece, past_key_values=cache, attention_mask=mask, position_ids=position).logits)
        assert cache.nbytes() == plan.bytes_at(tokens, ids.shape[0])
        own.given = cache.given
        with attending(model, own):
            wanted.append(model(piece, past_key_values=past, position_ids=position).logits)
        own.past = tokens
    assert cache.nbytes() == sum(bytes_within(layer) for layer in cache.layers)
    assert own.farthest < 1e-4
    assert float(torch.cat(wanted, 1).std()) > 0.1
    return float(((torch.cat(found, 1) - torch.cat(wanted, 1)).abs().amax(-1) * seen).max())


# Decoding


def random_forms(rng: random.Random, head_dim: int) -> list[tuple[TensorPlan, TensorPlan]]:
    def form(axis: str) -> TensorPlan:
        bits, group = rng.choice([1, 2, 3, 4, 5, 6, 8]), rng.choice([1, 4, 8, 16, 32])
        names = [f"int{bits}g{group}", f"int{bits}g{group}c", "full"]
        if head_dim & (head_dim - 1) == 0:
            names += [f"rot{min(bits, 5)}"]
        return tensor_plan(rng.choice(names), axis, head_dim, rng.choice([0.0, 0.0, 0.0, 0.15]))

    return [(form("channel"), form("token")) for _ in range(2)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(8))
def test_decoding_reads_what_an_attention_that_keeps_everything_reads(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    head_dim = rng.choice([8, 6, 4, 16])  # codes of 6 or 4 channels seldom fill bytes
    model = build(name, rng.choice([2, 3, 5, 16, 17, 31]), head_dim)
    plan = plan_of(model, random_forms(rng, head_dim), rng.choice([0, 1, 2, 4, 20]), rng.choice([0, 0, 1, 6, 40]))
    first, alone = rng.choice([1, 4, 30, 90]), rng.choice([40, 70])
    lengths = [first, *[1] * alone, *rng.choice([[], [7], [50, 1, 1]]), *[1] * 3]
    ids = prompt(sum(lengths), rng.choice([1, 1, 3]), seed)
    assert compare(model, plan, ids, lengths) < 1e-3


@pytest.mark.parametrize("name", ["Mistral", "Llama4Text"])
@pytest.mark.parametrize("span", [5, 12, 13, 14, 15, 16, 17, 20])
def test_windows_about_as_long_as_what_stays_in_full_precision(name: str, span: int) -> None:
    """Sinks, recent tokens and a group of keys are 2 + 6 + 8 = 16 tokens; every one of them is met alone."""
    model = build(name, span)
    forms = [(tensor_plan("int2g8", "channel", 8), tensor_plan("rot2", "token", 8))] * 2
    assert compare(model, plan_of(model, forms, 2, 6), prompt(60), [1] * 60) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_counts_as_tokens(name: str) -> None:
    model = build(name, 16)
    forms = [(tensor_plan("int3g4", "channel", 8), tensor_plan("int2g8", "token", 8))] * 2
    padding = torch.tensor([0, 5, 19])
    ids = prompt(60, 3)
    ids[torch.arange(60) < padding[:, None]] = 0
    assert compare(model, plan_of(model, forms, 2, 3), ids, [20, *[1] * 30, 5, *[1] * 5], padding) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_much_longer_than_the_window(name: str) -> None:
    """Of which pages of 512 tokens come and go, before and after it."""
    model = build(name, 40)
    forms = [(tensor_plan("int2g32", "channel", 8), tensor_plan("int3g8", "token", 8))] * 2
    plan = plan_of(model, forms, 4, 16)
    assert compare(model, plan, prompt(1300), [1200, *[1] * 40, 59, 1]) < 1e-3


def test_a_window_of_more_than_a_page() -> None:
    model = build("Mistral", 700, head_dim=6)
    forms = [
        (tensor_plan("int3g4", "channel", 6), tensor_plan("int1g6", "token", 6)),
        (tensor_plan("full", "channel", 6), tensor_plan("int5g6", "token", 6)),
    ]
    plan = plan_of(model, forms, 4, 16)
    assert compare(model, plan, prompt(2000), [690, *[1] * 20, 700, *[1] * 30, 550, *[1] * 10]) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_rounding_and_the_window_move_these_logits_by_far_more_than_the_tolerance(name: str) -> None:
    """So that agreement within it means something."""
    model, other = build(name, 16), build(name, 15)
    forms = [(tensor_plan("int2g4", "channel", 8), tensor_plan("rot2", "token", 8))] * 2
    exact = [(tensor_plan("full", "channel", 8), tensor_plan("full", "token", 8))] * 2
    logits = []
    for some, formats in ((model, forms), (model, exact), (other, exact)):
        cache = PlanCache.from_plan(plan_of(some, formats, 2, 3), some)
        logits.append(torch.cat([some(ids, past_key_values=cache).logits for ids in prompt(60).split(1, dim=1)], dim=1))
    assert float((logits[0] - logits[1]).abs().max()) > 0.03
    assert float((logits[1] - logits[2]).abs().max()) > 0.03


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("span", [2, 16])
def test_sixteen_bits_give_the_logits_of_transformers_own_cache(name: str, span: int) -> None:
    model = build(name, span)
    ours, theirs = PlanCache.from_plan(plan_for(model, FULL), model), DynamicCache(config=model.config)
    for ids in torch.split(prompt(80, 2), [12, 1, 9, *[1] * 30, 20, *[1] * 8], dim=1):
        assert torch.equal(model(ids, past_key_values=ours).logits, model(ids, past_key_values=theirs).logits)


@pytest.mark.parametrize("name", NAMES)
def test_one_forward_reads_what_decoding_through_the_cache_reads(name: str) -> None:
    """In float64, so that no code is a toss-up between two ways to add."""
    model = build(name, 16, dtype=torch.float64)
    ids = prompt(70)
    for window in ((4, 20), (0, 0), (2, 5)):
        plan = plan_for(model, MIXED, window, fraction=0.1)
        cache = PlanCache.from_plan(plan, model)
        alone = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(1, dim=1)], dim=1)
        with decoding_reads(model, plan):
            whole = model(ids).logits
        torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)
    assert float((whole - model(ids).logits).abs().max()) > 1e-2


# What is held


def test_tokens_that_left_the_window_free_their_bytes() -> None:
    """However long the text: a window, and what is left of the group before it."""
    model = build("Mistral", 16)
    cache = PlanCache.from_plan(plan_for(model, [("int2g8", "int2g8")], (2, 6)), model)
    sizes = set()
    for ids in prompt(120).split(1, dim=1):
        model(ids, past_key_values=cache)
        if cache.get_seq_length() > 24:
            sizes.add(cache.nbytes())
            assert max(layer.key.held for layer in cache.layers) <= 16 + 7
            assert max(layer.value.held for layer in cache.layers) == 16
    assert len(sizes) <= 8
    assert cache.get_seq_length() == 120


def test_no_query_reads_a_sink_that_has_left_the_window() -> None:
    model = build("Gemma3Text", 16)
    cache = PlanCache.from_plan(plan_for(model, [("int2g8", "int2g8")], (4, 6)), model)
    held = []
    for ids in prompt(30).split(1, dim=1):
        model(ids, past_key_values=cache)
        held.append([planned_layer(layer).key.sinks.tokens for layer in cache.layers])
    assert [sliding for sliding, _ in held] == [*range(1, 5), *[4] * 12, 3, 2, 1, *[0] * 11]
    assert {full for _, full in held[3:]} == {4}
