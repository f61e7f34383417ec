"""Where keys and values lie: when a token is quantized, what is read back, and in how many bytes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from handplans import bytes_within, hand_cache, hand_plan, tensor_plan, tensors_within
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import rounded, tokens_in_codes

from kvprof.errors import CacheError
from kvprof.records.formats import CODE_BITS
from kvprof.records.plan import Quantizer, TensorPlan, Window, quantized_tokens
from kvprof.runtime.cache import PlanCache
from kvprof.runtime.history import PAGE_TOKENS
from kvprof.runtime.store import TensorStore

USUAL = Quantizer()
FRACTIONS = (0.0, 0.0, 0.1, 0.25, 1.0)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def store_of(form: TensorPlan, window: tuple[int, int], heads: int = 2, head_dim: int = 16) -> TensorStore:
    return TensorStore(form, Window(sink_tokens=window[0], recent_tokens=window[1]), USUAL, heads, head_dim)


def fill(store: TensorStore, x: torch.Tensor, chunk: int) -> None:
    for piece in torch.split(x, chunk, dim=2):
        store.append(piece)
        store.settle()


def held(store: TensorStore, like: torch.Tensor) -> torch.Tensor:
    """Return everything that the store holds, as a query with no token of its own would read it."""
    return store.read(like[:, :, :0])


def expected(x: torch.Tensor, form: TensorPlan, window: tuple[int, int]) -> torch.Tensor:
    """Return what a cache of the tokens x gives back."""
    sinks = window[0]
    coded = tokens_in_codes(x.shape[2], form, Window(sink_tokens=sinks, recent_tokens=window[1]))
    out = x.clone()
    if coded:
        out[:, :, sinks : sinks + coded] = torch.from_numpy(
            rounded(x[:, :, sinks : sinks + coded].numpy(), form, USUAL)
        )
    return out


def random_form(rng: random.Random, axis: str, head_dim: int, usual_groups: bool = False) -> TensorPlan:
    groups = (16, 32, 64, 128) if usual_groups else (1, 5, 8, 20, 32, 100)
    names = [f"int{rng.choice(CODE_BITS)}g{rng.choice(groups)}{rng.choice(['', 'c'])}"]
    if head_dim & (head_dim - 1) == 0:
        names.append(f"rot{rng.choice(CODE_BITS)}")
    name = rng.choice([*names, *names, *names, "full"])
    return tensor_plan(name, axis, head_dim, rng.choice(FRACTIONS))


def random_cache(rng: random.Random) -> tuple[PlanCache, tuple[int, int, int], torch.dtype]:
    """Return the empty cache of a random plan, the shape of its tokens (heads, key and value head dim), its dtype."""
    heads, dims = rng.choice([1, 1, 2, 3]), (rng.choice([1, 4, 16, 20, 64]), rng.choice([2, 7, 16, 20, 32]))
    dtype = rng.choice(["float32", "bfloat16", "float16", "float64"])
    stored = rng.choice(["float16", "bfloat16"])
    layers = [
        (
            random_form(rng, rng.choice(["channel", "channel", "token"]), dims[0]),
            random_form(rng, rng.choice(["token", "token", "channel"]), dims[1]),
        )
        for _ in range(rng.choice([1, 2]))
    ]
    window = (rng.choice([0, 1, 4, 8]), rng.choice([0, 1, 31, 128, 200]))
    quantizer = Quantizer.model_validate({"scale_dtype": stored, "zero_dtype": stored})
    plan = hand_plan(layers, heads, dims, window, dtype, quantizer)
    return hand_cache(plan), (heads, *dims), getattr(torch, dtype)


def check_bytes(cache: PlanCache, tokens: int, batch: int) -> None:
    found = tensors_within(cache)
    assert cache.nbytes() == cache.plan.bytes_at(tokens, batch)
    assert cache.nbytes() == sum(x.numel() * x.element_size() for x in found)
    assert cache.nbytes() == bytes_within(cache)  # no tensor is a view of something larger, and none is held twice


# ---- bytes


@pytest.mark.parametrize("seed", range(120))
def test_the_bytes_of_a_cache_are_those_of_its_plan_however_it_is_filled(seed: int) -> None:
    rng = random.Random(seed)
    cache, (heads, key_dim, value_dim), dtype = random_cache(rng)
    batch, tokens = rng.choice([1, 1, 2, 4]), 0
    check_bytes(cache, 0, batch)
    for _ in range(rng.choice([1, 4, 12])):
        more = rng.choice([1, 1, 2, 33, 100, 512, 700])
        for layer in range(len(cache.layers)):
            keys = numbers(batch, heads, more, key_dim, dtype=dtype)
            values = numbers(batch, heads, more, value_dim, dtype=dtype)
            cache.update(keys, values, layer)
        tokens += more
        check_bytes(cache, tokens, batch)


@pytest.mark.parametrize(
    ("bits", "name"), itertools.product(CODE_BITS, ["int{}g32", "int{}g7", "int{}g8c", "rot{}"]), ids=str
)
def test_token_by_token_the_bytes_are_right_at_every_length(bits: int, name: str) -> None:
    """Three channels of one head fill whole bytes only at eight tokens."""
    head_dim = 4 if name.startswith("rot") else 3
    form = tensor_plan(name.format(bits), "token", head_dim)
    other = tensor_plan(name.format(bits) if head_dim == 3 else f"int{bits}g7", "channel", head_dim)
    cache = hand_cache(hand_plan([(other, form)], 1, (head_dim, head_dim), (2, 5), "bfloat16"))
    keys, values = numbers(2, 2, 1, 70, head_dim, dtype=torch.bfloat16)
    for tokens in range(1, 71):
        cache.update(keys[:, :, tokens - 1 : tokens], values[:, :, tokens - 1 : tokens], 0)
        check_bytes(cache, tokens, 2)


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (8, 1), (3, 200)])
def test_token_by_token_past_the_end_of_a_block(sinks: int, window: int) -> None:
    key, value = tensor_plan("int3g32", "channel", 20), tensor_plan("int3g32", "token", 20, 0.1)
    cache = hand_cache(hand_plan([(key, value)], 1, (20, 20), (sinks, window)))
    keys, values = numbers(2, 1, 1, PAGE_TOKENS * 2 + 300, 20)
    for tokens in range(1, keys.shape[2] + 1):
        cache.update(keys[:, :, tokens - 1 : tokens], values[:, :, tokens - 1 : tokens], 0)
        assert cache.nbytes() == cache.plan.bytes_at(tokens)
    check_bytes(cache, tokens, 1)
    for store, x in zip(cache.layers[0].stores, (keys, values), strict=True):
        assert torch.equal(held(store, x), expected(x, store.form, (sinks, window)))


def test_a_long_prompt_leaves_nothing_larger_than_itself_behind() -> None:
    key, value = tensor_plan("int2g128", "channel", 64), tensor_plan("int2g64", "token", 64)
    cache = hand_cache(hand_plan([(key, value)], 2, (64, 64), (4, 128), "bfloat16"))
    prompt = numbers(1, 2, 8 * PAGE_TOKENS + 700, 64, dtype=torch.bfloat16)
    strided = torch.stack([prompt, prompt], dim=3)[:, :, :, 0]  # as a slice of a fused projection would be
    cache.update(strided, strided, 0)
    check_bytes(cache, prompt.shape[2], 1)


# ---- contents


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_store_gives_back_what_the_design_says_in_chunks_of_any_size(seed: int) -> None:
    rng = random.Random(seed)
    head_dim, heads, batch = rng.choice([1, 8, 16, 20]), rng.choice([1, 2, 3]), rng.choice([1, 3])
    form = random_form(rng, rng.choice(["channel", "token"]), head_dim)
    form = form.model_copy(update={"clip": "none"})  # two fractions can tie; the quantizer's own tests cover them
    window = (rng.randint(0, 8), rng.choice([0, 1, 7, 40, 200]))
    x = numbers(batch, heads, rng.choice([3, 60, 500, 1300]), head_dim, seed=seed)
    wanted = expected(x, form, window)
    for chunk in {rng.choice([1, 7, 64] if x.shape[2] <= 60 else [64, 333]), x.shape[2]}:
        store = store_of(form, window, heads, head_dim)
        fill(store, x, chunk)
        found = held(store, x)
        assert found.shape == wanted.shape
        if form.scheme == "rotated":
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["int2g32c", "int3g5", "rot2", "rot3", "full"])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_change_no_bit_of_what_is_held(name: str, axis: str, dtype: torch.dtype) -> None:
    x = numbers(2, 3, 1100, 16, dtype=dtype)
    whole = store_of(tensor_plan(name, axis, 16), (4, 20), heads=3)
    fill(whole, x, 1100)
    for chunk in (5, 97, 512):
        pieces = store_of(tensor_plan(name, axis, 16), (4, 20), heads=3)
        fill(pieces, x, chunk)
        assert torch.equal(held(pieces, x), held(whole, x))


@settings(deadline=None)
@given(
    tokens=st.integers(0, 400),
    sinks=st.integers(0, 8),
    recent=st.integers(0, 200),
    group=st.integers(1, 130),
    channel=st.booleans(),
    fraction=st.sampled_from([0.0, 0.1, 0.3, 1 / 3, 0.7, 1.0]),
)
def test_a_token_is_quantized_exactly_when_enough_follow_it(
    tokens: int, sinks: int, recent: int, group: int, channel: bool, fraction: float
) -> None:
    form = tensor_plan(f"int2g{group}", "channel" if channel else "token", 16, fraction)
    window = Window(sink_tokens=sinks, recent_tokens=recent)
    wanted = tokens_in_codes(tokens, form, window)
    assert quantized_tokens(form, window, tokens, fraction) == wanted
    store = TensorStore(form, window, USUAL, 1, 2)
    fill(store, torch.randn(1, 1, tokens, 2), max(1, tokens // 3))
    assert (store.tokens, store.codes.tokens) == (tokens, wanted)


def test_a_query_reads_its_own_token_unrounded_and_history_as_stored() -> None:
    form = tensor_plan("int2g8", "channel", 16)
    x = numbers(1, 2, 30, 16)
    store = store_of(form, (2, 0))
    fill(store, x[:, :, :29], 29)
    read = store.read(x[:, :, 29:])
    assert torch.equal(read[:, :, 29], x[:, :, 29])
    assert torch.equal(read[:, :, :29], expected(x[:, :, :29], form, (2, 0)))


def test_history_is_never_quantized_again() -> None:
    store = store_of(tensor_plan("int1g4", "token", 16), (0, 3))
    x = numbers(1, 2, 40, 16)
    fill(store, x[:, :, :20], 1)
    before = held(store, x)[:, :, :17]
    fill(store, x[:, :, 20:], 1)
    assert torch.equal(held(store, x)[:, :, :17], before)


def test_the_window_of_keys_and_of_values_is_their_own() -> None:
    layers = [(tensor_plan("int2g1", "channel", 8, 0.5), tensor_plan("int2g8", "token", 8, 0.1))]
    cache = hand_cache(hand_plan(layers, 1, (8, 8), (0, 10)))
    cache.update(numbers(1, 1, 200, 8), numbers(1, 1, 200, 8), 0)
    key, value = cache.layers[0].stores
    assert (key.codes.tokens, value.codes.tokens) == (100, 180)


# ---- going back


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_going_back_leaves_what_never_seeing_the_tokens_would_or_is_refused(seed: int) -> None:
    rng = random.Random(seed)
    form = random_form(rng, rng.choice(["channel", "token"]), 8).model_copy(update={"recent_fraction": 0.0})
    window = (rng.randint(0, 5), rng.choice([0, 3, 50]))
    x = numbers(2, 2, rng.choice([20, 120, 700]), 8, seed=seed)
    store, keep = store_of(form, window, head_dim=8), rng.randint(0, x.shape[2])
    fill(store, x, rng.choice([13, 700]))
    before, size = held(store, x), store.codes.tokens
    limits = Window(sink_tokens=window[0], recent_tokens=window[1])
    allowed = min(size, max(0, keep - window[0])) <= tokens_in_codes(keep, form, limits)
    if not allowed:
        with pytest.raises(CacheError, match="nothing was changed"):
            store.check_crop(keep)
        assert torch.equal(held(store, x), before)
        return
    store.check_crop(keep)
    store.crop(keep)
    store.settle()
    fresh = store_of(form, window, head_dim=8)
    fill(fresh, x[:, :, :keep], max(1, keep))
    assert store.tokens == keep
    assert torch.equal(held(store, x), held(fresh, x))
    assert bytes_within(store) == bytes_within(fresh)
    fill(store, x[:, :, keep:], 9)
    assert torch.equal(held(store, x), before)


def test_tokens_held_back_from_rounding_are_rounded_once_settled() -> None:
    store = store_of(tensor_plan("int2g8", "channel", 16), (0, 0))
    x = numbers(1, 2, 64, 16)
    store.append(x)
    store.settle(40)
    assert (store.codes.tokens, store.recent.tokens) == (40, 24)
    store.crop(56)
    store.settle()
    assert torch.equal(held(store, x), rounded_to(x[:, :, :56], store.form))


def rounded_to(x: torch.Tensor, form: TensorPlan) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rounded(x.numpy(), form, USUAL)))


# ---- every tensor by its name


@pytest.mark.parametrize("seed", range(20))
def test_a_store_is_restored_from_its_named_tensors(seed: int) -> None:
    rng = random.Random(seed)
    form, x = random_form(rng, rng.choice(["channel", "token"]), 16), numbers(2, 2, 1200, 16)
    store, other = (store_of(form, (4, 100)) for _ in range(2))
    fill(store, x, 300)
    other.restore(dict(store.named_tensors()), 2, torch.float32)
    assert torch.equal(held(other, x), held(store, x))
    fill(other, x, 50)
    fill(store, x, 50)
    assert torch.equal(held(other, x), held(store, x))
