"""Decoding through a PlanCache, against an attention of this file's own: own history, own rounding, own softmax.

The model is a transformers one; only its attention function is replaced. Both are given the very numbers that the cache
was given to round, so that a last bit cannot move one of them into the next code.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from handplans import hand_cache, hand_plan, tensor_plan
from reference import given_back
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from kvprof.records.formats import CODE_BITS
from kvprof.records.plan import BitPlan, TensorPlan
from kvprof.runtime.cache import PlanCache

VOCABULARY = 96
STEPS = 3
HEADS = {"gqa": (4, 2), "mqa": (4, 1), "mha": (2, 2)}
"""Query heads and KV heads."""
SEEDS = 42


def llama(query_heads: int, kv_heads: int, head_dim: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval().requires_grad_(False)


class Recording(PlanCache):
    """Keeps what each layer was given, (B, H, T, D) of keys and values, all of it."""

    given: dict[int, tuple[Tensor, Tensor]]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        old = self.given.get(layer_idx)
        new = (key_states, value_states)
        self.given[layer_idx] = new if old is None else tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Attention:
    """Attends to a history of its own, rounded as the plan says, and to the new tokens unrounded."""

    def __init__(self, plan: BitPlan, given: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.plan = plan
        self.given = given
        self.past = 0
        self.farthest = 0.0

    def history(self, exact_BHTD: Tensor, form: TensorPlan) -> np.ndarray:
        """Return what the cache gives back of the tokens before this forward."""
        return given_back(exact_BHTD[:, :, : self.past].numpy(), form, self.plan.window, self.plan.quantizer)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: object
    ) -> tuple[Tensor, None]:
        entry, (keys, values) = self.plan.layers[module.layer_idx], self.given[module.layer_idx]
        new = query.shape[2]
        # The key and value that this run made itself are those of the other run, up to the last bits.
        self.farthest = max(
            self.farthest,
            float((key[:, :, -new:] - keys[:, :, self.past : self.past + new]).abs().max()),
            float((value[:, :, -new:] - values[:, :, self.past : self.past + new]).abs().max()),
        )
        repeats = query.shape[1] // key.shape[1]
        k, v = (
            np.concatenate([self.history(exact, form), own[:, :, -new:].numpy()], axis=2).repeat(repeats, axis=1)
            for exact, form, own in ((keys, entry.key, key), (values, entry.value, value))
        )
        scores = query.numpy().astype(np.float64) @ k.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        position, reads = np.arange(k.shape[2])[None, :], self.past + np.arange(new)[:, None]
        scores = np.where(position <= reads, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ v
        return torch.from_numpy(out.astype(np.float32)).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def attending(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    own = model.config._attn_implementation
    AttentionInterface.register("by_hand", attention)
    model.config._attn_implementation = "by_hand"
    try:
        yield
    finally:
        model.config._attn_implementation = own


def random_plan(rng: random.Random, kv_heads: int, head_dim: int, bits: int) -> BitPlan:
    """Return a plan in which one tensor has so many bits, and both schemes and all groups take turns."""

    def form(axis: str, bits: int) -> TensorPlan:
        group = rng.choice([16, 32, 64, 128])
        names = [f"int{bits}g{group}", f"int{bits}g{group}c", f"rot{bits}"]
        fraction = rng.choice([0.0, 0.0, 0.0, 0.15])
        return tensor_plan(rng.choice(names), axis, head_dim, fraction)

    def any_bits() -> int:
        return rng.choice([*CODE_BITS, 16])

    def of(axis: str, bits: int) -> TensorPlan:
        return tensor_plan("full", axis, head_dim) if bits == 16 else form(axis, bits)

    layers = [(of("channel", bits), of("token", any_bits())), (of("channel", any_bits()), of("token", bits))]
    window = (rng.choice([0, 1, 4, 8]), rng.choice([0, 0, 1, 16, 32, 100, 200]))
    return hand_plan(layers, kv_heads, (head_dim, head_dim), window)


def compare(model: PreTrainedModel, plan: BitPlan, ids: Tensor, prompt: int, chunk: int) -> float:
    """Prefill in chunks, then decode token by token, both ways; return the largest difference of any logit."""
    recording = Recording(plan, hand_cache(plan).layers)
    recording.given = {}
    lengths = [min(chunk, prompt - first) for first in range(0, prompt, chunk)] + [1] * (ids.shape[1] - prompt)
    pieces = torch.split(ids, lengths, dim=1)
    found = torch.cat([model(piece, past_key_values=recording).logits for piece in pieces], 1)
    assert recording.nbytes() == plan.bytes_at(ids.shape[1], ids.shape[0])

    own, past = Attention(plan, recording.given), DynamicCache()
    wanted = []
    with attending(model, own):
        for piece in pieces:
            wanted.append(model(piece, past_key_values=past).logits)
            own.past += piece.shape[1]
    assert own.farthest < 1e-4
    assert float(torch.cat(wanted, 1).std()) > 0.1
    return float((found - torch.cat(wanted, 1)).abs().max())


@pytest.mark.parametrize("seed", range(SEEDS))
def test_decoding_reads_what_an_independent_rounded_attention_reads(seed: int) -> None:
    rng = random.Random(seed)
    bits = CODE_BITS[seed % len(CODE_BITS)]
    query_heads, kv_heads = HEADS[["gqa", "mqa", "mha"][seed // len(CODE_BITS) % 3]]
    head_dim = rng.choice([16, 64])
    model, plan = llama(query_heads, kv_heads, head_dim), random_plan(rng, kv_heads, head_dim, bits)
    prompt = plan.window.recent_tokens + rng.choice([20, 70, 140, 270])
    ids = torch.randint(
        0,
        VOCABULARY,
        (rng.choice([1, 2, 4]), prompt + rng.choice([STEPS, 34])),
        generator=torch.Generator().manual_seed(seed),
    )
    assert compare(model, plan, ids, prompt, rng.choice([prompt, 64])) < 1e-3


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", HEADS)
def test_every_token_of_a_text_decoded_alone(kind: str, batch: int) -> None:
    """From the first token on, so that every length is met at which a token or a group of them is quantized."""
    query_heads, kv_heads = HEADS[kind]
    layers = [
        (tensor_plan("int2g16c", "channel", 16), tensor_plan("rot2", "token", 16)),
        (tensor_plan("rot3", "token", 16), tensor_plan("int3g16", "token", 16, 0.1)),
    ]
    plan = hand_plan(layers, kv_heads, (16, 16), (2, 5))
    ids = torch.randint(0, VOCABULARY, (batch, 60), generator=torch.Generator().manual_seed(7))
    assert compare(llama(query_heads, kv_heads, 16), plan, ids, 1, 1) < 1e-3


def test_rounding_moves_these_logits_by_far_more_than_the_tolerance() -> None:
    """So that agreement within it means something."""
    plan = hand_plan([(tensor_plan("int2g16", "channel", 16), tensor_plan("rot2", "token", 16))] * 2, 2, (16, 16))
    exact = hand_plan([(tensor_plan("full", "channel", 16), tensor_plan("full", "token", 16))] * 2, 2, (16, 16))
    model, ids = llama(4, 2, 16), torch.randint(0, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(1))
    logits = []
    for some in (plan, exact):
        cache = hand_cache(some)
        model(ids[:, :-1], past_key_values=cache)
        logits.append(model(ids[:, -1:], past_key_values=cache).logits)
    assert float((logits[0] - logits[1]).abs().max()) > 0.1


@pytest.mark.parametrize("batch", [1, 4])
def test_a_plan_of_all_sixteen_bits_gives_the_logits_of_a_dynamic_cache(batch: int) -> None:
    plan = hand_plan([(tensor_plan("full", "channel", 16), tensor_plan("full", "token", 16))] * 2, 2, (16, 16), (4, 8))
    model = llama(4, 2, 16)
    ids = torch.randint(0, VOCABULARY, (batch, 600), generator=torch.Generator().manual_seed(2))
    ours, theirs = hand_cache(plan), DynamicCache()
    for piece in torch.split(ids, [590, *[1] * 10], dim=1):
        assert torch.equal(model(piece, past_key_values=ours).logits, model(piece, past_key_values=theirs).logits)
