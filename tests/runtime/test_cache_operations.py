"""Every use of a cache, in random order, against a plain Python model of one: lists of tokens and the design's rule."""

from __future__ import annotations

import random

import pytest
import torch
from handplans import hand_cache, hand_plan, tensor_plan
from reference import tokens_in_codes
from torch import Tensor

from kvprof.errors import CacheError
from kvprof.records.plan import BitPlan, TensorPlan
from kvprof.runtime.cache import PlanCache
from kvprof.runtime.layers import RECORDED_TOKENS
from kvprof.runtime.quantizer import fake_quantize

SEQUENCES = 500
HEADS, HEAD_DIM = 2, 8
KEYS = ["int1g16", "int2g32c", "int3g20", "int4g100", "int8g1", "rot2", "full"]
VALUES = ["int1g8", "int2g8c", "int3g5", "int5g3", "int6g8", "rot3", "full"]


class Tokens:
    """Every token that was ever made: its keys and values in each layer, found by its number."""

    def __init__(self, plan: BitPlan, seed: int) -> None:
        self.plan = plan
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = [[torch.empty(0, HEADS, HEAD_DIM) for _ in range(2)] for _ in plan.layers]

    def make(self, count: int) -> list[int]:
        first = self.rows[0][0].shape[0]
        for tensors in self.rows:
            for i, known in enumerate(tensors):
                new = torch.randn(count, HEADS, HEAD_DIM, generator=self.generator)
                tensors[i] = torch.cat([known, new])
        return list(range(first, first + count))

    def gather(self, layer: int, tensor: int, sequences: list[list[int]]) -> Tensor:
        """Return the exact numbers of some sequences: (B, H, T, D)."""
        return self.rows[layer][tensor][torch.tensor(sequences, dtype=torch.long)].transpose(1, 2)


class PlainCache:
    """What a cache should be: for each sequence the numbers of its tokens; for each tensor how many are in codes."""

    def __init__(self, plan: BitPlan, tokens: Tokens) -> None:
        self.plan = plan
        self.tokens = tokens
        self.sequences: list[list[int]] = []
        self.coded = {(entry.layer, tensor): 0 for entry in plan.layers for tensor in range(2)}
        self.recording = False

    def form(self, layer: int, tensor: int) -> TensorPlan:
        entry = self.plan.layers[layer]
        return entry.key if tensor == 0 else entry.value

    @property
    def length(self) -> int:
        return len(self.sequences[0]) if self.sequences else 0

    def settle(self, tokens: int) -> None:
        for place, coded in self.coded.items():
            self.coded[place] = max(coded, tokens_in_codes(max(0, tokens), self.form(*place), self.plan.window))

    def append(self, new: list[list[int]]) -> None:
        if not self.sequences:
            self.sequences = [[] for _ in new]
        self.sequences = [old + more for old, more in zip(self.sequences, new, strict=True)]
        self.settle(self.length - RECORDED_TOKENS if self.recording else self.length)

    def can_crop(self, tokens: int) -> bool:
        """Whether no token would stay that is in codes and would not be, had the cache never seen the others."""
        sinks = self.plan.window.sink_tokens
        return all(
            min(coded, max(0, tokens - sinks)) <= tokens_in_codes(tokens, self.form(*place), self.plan.window)
            for place, coded in self.coded.items()
        )

    def crop(self, tokens: int) -> None:
        self.sequences = [sequence[:tokens] for sequence in self.sequences]
        sinks = self.plan.window.sink_tokens
        self.coded = {place: min(coded, max(0, tokens - sinks)) for place, coded in self.coded.items()}
        self.settle(tokens)

    def read(self, layer: int, tensor: int) -> Tensor:
        """Return what a query reads, each group of tokens rounded by itself."""
        sinks, coded = self.plan.window.sink_tokens, self.coded[layer, tensor]
        form, out = self.form(layer, tensor), self.tokens.gather(layer, tensor, self.sequences)
        if coded:
            unit = form.group_size if form.axis == "channel" else 1
            old = out[:, :, sinks : sinks + coded]
            groups = old.unflatten(2, (-1, unit)).transpose(1, 2).flatten(0, 1)  # (B * groups, H, unit, D)
            back = fake_quantize(groups, form, self.plan.quantizer).unflatten(0, (out.shape[0], -1))
            out[:, :, sinks : sinks + coded] = back.transpose(1, 2).flatten(2, 3)
        return out

    def nbytes(self) -> int:
        if not self.recording:
            return self.plan.bytes_at(self.length, len(self.sequences))
        per_sequence = 0
        for place, coded in self.coded.items():
            form, width = self.form(*place), HEADS * HEAD_DIM
            per_sequence += (self.length - coded) * width * 4 + -(-coded * width * form.bits // 8)
            if form.scheme == "rotated":
                per_sequence += coded * HEADS * 2
            elif form.axis == "token":
                per_sequence += coded * HEADS * -(-HEAD_DIM // form.group_size) * 4
            else:
                per_sequence += coded // form.group_size * width * 4
        return per_sequence * len(self.sequences)


class Pair:
    """A cache and its model, to which the same is done."""

    def __init__(self, rng: random.Random, seed: int) -> None:
        layers = [
            (
                tensor_plan(rng.choice(KEYS), "channel", HEAD_DIM, rng.choice([0.0, 0.0, 0.2])),
                tensor_plan(rng.choice(VALUES), "token", HEAD_DIM, rng.choice([0.0, 0.0, 0.1])),
            )
            for _ in range(rng.choice([1, 2, 3]))
        ]
        window = (rng.choice([0, 1, 4, 8]), rng.choice([0, 1, 10, 128, 200]))
        self.rng = rng
        self.plan = hand_plan(layers, HEADS, (HEAD_DIM, HEAD_DIM), window)
        self.cache: PlanCache = hand_cache(self.plan)
        self.tokens = Tokens(self.plan, seed)
        self.model = PlainCache(self.plan, self.tokens)
        self.settled = 0
        """Tokens that were there when recording began, or that the last crop kept: they are held back no more."""

    def do(self, name: str) -> None:
        getattr(self, name)()
        self.check()

    def append(self) -> None:
        count = self.rng.choice([1, 1, 1, 2, 7, 40, 130, self.rng.randint(1, 700)])
        batch = len(self.model.sequences) or self.rng.choice([1, 2, 3])
        new = [self.tokens.make(count) for _ in range(batch)]
        for layer in range(len(self.plan.layers)):
            assert self.cache.get_mask_sizes(count, layer) == (self.model.length + count, 0)
            exact = [self.tokens.gather(layer, tensor, new) for tensor in range(2)]
            read = self.cache.update(*exact, layer)
            for tensor in range(2):
                assert torch.equal(read[tensor][:, :, -count:], exact[tensor])
                if self.model.sequences:
                    assert torch.equal(read[tensor][:, :, :-count], self.model.read(layer, tensor))
                assert read[tensor].shape[2] == self.model.length + count
        self.model.append(new)

    def append_one_by_one(self) -> None:
        for _ in range(self.rng.randint(2, 12)):
            new = [self.tokens.make(1) for _ in self.model.sequences or range(2)]
            for layer in range(len(self.plan.layers)):
                self.cache.update(*(self.tokens.gather(layer, tensor, new) for tensor in range(2)), layer)
            self.model.append(new)

    def append_another_batch(self) -> None:
        """As the model itself does: refused, and nothing is added to that layer."""
        if not self.model.sequences:
            return
        wrong = torch.zeros(len(self.model.sequences) + 1, HEADS, 3, HEAD_DIM)
        with pytest.raises(CacheError, match="sequences"):
            self.cache.update(wrong, wrong, 0)

    def reorder(self) -> None:
        batch = len(self.model.sequences)
        if batch:
            chosen = [self.rng.randrange(batch) for _ in range(batch)]
            self.cache.reorder_cache(torch.tensor(chosen))
            self.model.sequences = [self.model.sequences[i] for i in chosen]

    def select(self) -> None:
        batch = len(self.model.sequences)
        if batch:
            chosen = self.rng.sample(range(batch), self.rng.randint(1, batch))
            self.cache.batch_select_indices(torch.tensor(chosen))
            self.model.sequences = [self.model.sequences[i] for i in chosen]

    def repeat(self) -> None:
        times = self.rng.choice([1, 2, 3])
        if times * len(self.model.sequences) <= 4:
            self.cache.batch_repeat_interleave(times)
            self.model.sequences = [sequence for sequence in self.model.sequences for _ in range(times)]

    def crop(self) -> None:
        length = self.model.length
        remove = self.rng.choice([0, 1, 1, 2, 5, 17, 128, self.rng.randint(0, length), length + 3])
        keep = max(0, length - remove)
        number = keep if keep > 0 and self.rng.random() < 0.3 else -remove
        if self.model.recording and remove <= min(RECORDED_TOKENS, length - self.settled):
            assert self.model.can_crop(keep)
        if self.model.can_crop(keep):
            self.cache.crop(number)
            self.model.crop(keep)
            self.settled = keep
        else:
            with pytest.raises(CacheError, match="nothing was changed"):
                self.cache.crop(number)

    def record(self) -> None:
        if not self.model.recording:
            self.settled = self.model.length
        self.cache.activate_past_recording()
        self.model.recording = True

    def reset(self) -> None:
        self.cache.reset()
        self.model.sequences = []
        self.model.coded = dict.fromkeys(self.model.coded, 0)
        self.model.recording = False
        self.settled = 0

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.model.length
        assert self.cache.get_mask_sizes(5, 0) == (self.model.length + 5, 0)
        assert self.cache.nbytes() == self.model.nbytes()
        for layer, held in enumerate(self.cache.layers):
            assert held.get_seq_length() == self.model.length
            for tensor, store in enumerate(held.stores):
                assert store.codes.tokens == self.model.coded[layer, tensor]
                if self.model.sequences:
                    none = torch.empty(len(self.model.sequences), HEADS, 0, HEAD_DIM)
                    assert torch.equal(store.read(none), self.model.read(layer, tensor))


OPERATIONS = {
    "append": 8,
    "append_one_by_one": 2,
    "append_another_batch": 1,
    "reorder": 3,
    "select": 2,
    "repeat": 2,
    "crop": 5,
    "record": 1,
    "reset": 1,
}


@pytest.mark.parametrize("seed", range(0, SEQUENCES, 10))
def test_random_operations_leave_what_a_plain_model_of_the_cache_holds(seed: int) -> None:
    for number in range(seed, seed + 10):
        rng = random.Random(number)
        pair = Pair(rng, number)
        if rng.random() < 0.4:
            pair.do("record")
        pair.do("append")
        for name in rng.choices(list(OPERATIONS), list(OPERATIONS.values()), k=rng.randint(3, 10)):
            pair.do(name)
