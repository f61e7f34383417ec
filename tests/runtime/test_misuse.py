"""What is no key, no layer or no sequence is refused by name, and leaves the cache as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from handplans import hand_cache, hand_plan, tensor_plan

from kvprof import PlanCache
from kvprof.errors import CacheError

HEADS, HEAD_DIM = 2, 8


@pytest.fixture
def cache() -> PlanCache:
    """Two layers and two sequences of nine tokens, most of them in codes."""
    forms = (tensor_plan("int4g8", "channel", HEAD_DIM), tensor_plan("int4g8", "token", HEAD_DIM))
    cache = hand_cache(hand_plan([forms, forms], HEADS, (HEAD_DIM, HEAD_DIM), (1, 0)))
    for layer in range(2):
        cache.update(states(9), states(9), layer)
    return cache


def states(tokens: int) -> torch.Tensor:
    return torch.randn(2, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(tokens))


def held_by(cache: PlanCache) -> list[torch.Tensor]:
    return [store.read(states(0)).clone() for layer in cache.layers for store in layer.stores]


MISUSES: dict[str, tuple[Callable[[PlanCache], Any], str]] = {
    "a layer too many": (lambda c: c.update(states(1), states(1), 9), "there is no layer 9: the cache has 0 to 1"),
    "a layer from the end": (lambda c: c.update(states(1), states(1), -1), "there is no layer -1"),
    "no layer": (lambda c: c.update(states(1), states(1), None), "there is no layer None"),
    "keys without a batch": (lambda c: c.update(states(1)[0], states(1), 0), r"given float32 of \(2, 1, 8\), no"),
    "values of whole numbers": (lambda c: c.update(states(1), states(1).int(), 0), "given int32 of"),
    "no keys": (lambda c: c.update(None, states(1), 0), "given a NoneType"),
    "NumPy's": (lambda c: c.update(states(1).numpy(), states(1), 0), "given a ndarray"),
    "a word to crop by": (lambda c: c.crop("x"), "'x' is no number of tokens"),
    "a share to crop by": (lambda c: c.crop(-1.0), "-1.0 is no number of tokens"),
    "repeated never": (lambda c: c.batch_repeat_interleave(0), "cannot be repeated 0 times"),
    "repeated less than never": (lambda c: c.batch_repeat_interleave(-1), "cannot be repeated -1 times"),
    "selected that is not there": (lambda c: c.batch_select_indices(torch.tensor([9])), "there is no sequence 9"),
    "reordered by what is not there": (lambda c: c.reorder_cache(torch.tensor([5, 0])), "there is no sequence 5"),
    "selected by a list": (lambda c: c.batch_select_indices([0]), "a list names no sequences"),
    "reordered by floats": (lambda c: c.reorder_cache(torch.tensor([0.0, 1])), "float32 of .* names no sequences"),
}


@pytest.mark.parametrize("what", MISUSES)
def test_a_misuse_is_named_and_changes_nothing(what: str, cache: PlanCache) -> None:
    misuse, words = MISUSES[what]
    before = held_by(cache)
    held = cache.nbytes()
    with pytest.raises(CacheError, match=words):
        misuse(cache)
    assert (cache.nbytes(), cache.get_seq_length()) == (held, 9)
    assert all(map(torch.equal, held_by(cache), before))


def test_what_is_allowed_still_is(cache: PlanCache) -> None:
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    cache.batch_select_indices(torch.tensor([-1, 0]))
    cache.batch_select_indices(torch.tensor([True, False]))
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    cache.crop(-0)
    assert cache.get_seq_length() == 9
    assert cache.layers[0].batch == 3
