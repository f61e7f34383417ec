"""Every use of a cache, in random order, against a plain Python model of one: lists of tokens and the design's rule."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from handplans import hand_cache, hand_plan, tensor_plan
from reference import first_held, tokens_in_codes
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from kvprof.errors import CacheError
from kvprof.records.plan import BitPlan, TensorPlan
from kvprof.runtime.cache import PlanCache
from kvprof.runtime.layers import RECORDED_TOKENS
from kvprof.runtime.quantization.quantizer import fake_quantize

SEQUENCES = 500
SLIDING_SEQUENCES = 350
HEADS, HEAD_DIM = 2, 8
KEYS = ["int1g16", "int2g32c", "int3g20", "int4g100", "int8g1", "rot2", "full"]
VALUES = ["int1g8", "int2g8c", "int3g5", "int5g3", "int6g8", "rot3", "full"]


def head_dim(plan: BitPlan) -> int:
    assert plan.geometry is not None
    return plan.geometry.layers[0].key_head_dim


class Tokens:
    """Every token that was ever made: its keys and values in each layer, found by its number."""

    def __init__(self, plan: BitPlan, seed: int) -> None:
        self.plan = plan
        self.generator = torch.Generator().manual_seed(seed)
        self.head_dim = head_dim(plan)
        self.rows = [[torch.empty(0, HEADS, self.head_dim) for _ in range(2)] for _ in plan.layers]

    def make(self, count: int) -> list[int]:
        first = self.rows[0][0].shape[0]
        for tensors in self.rows:
            for i, known in enumerate(tensors):
                new = torch.randn(count, HEADS, self.head_dim, generator=self.generator)
                tensors[i] = torch.cat([known, new])
        return list(range(first, first + count))

    def gather(self, layer: int, tensor: int, sequences: list[list[int]]) -> Tensor:
        """Return the exact numbers of some sequences: (B, H, T, D)."""
        return self.rows[layer][tensor][torch.tensor(sequences, dtype=torch.long)].transpose(1, 2)


class PlainCache:
    """What a cache should be: for each sequence the numbers of its tokens; for each tensor how many are in codes.

    Nothing is ever let go: `oldest` says, for each tensor, from which position on the tokens count.
    """

    def __init__(self, plan: BitPlan, tokens: Tokens) -> None:
        self.plan = plan
        self.tokens = tokens
        self.sequences: list[list[int]] = []
        self.coded = {(entry.layer, tensor): 0 for entry in plan.layers for tensor in range(2)}
        self.oldest = dict.fromkeys(self.coded, 0)
        self.recording = False

    def span(self, layer: int) -> int | None:
        """Return how many tokens a query of a layer sees, itself included."""
        assert self.plan.geometry is not None
        return self.plan.geometry.layers[layer].window

    def read_from(self, layer: int) -> int:
        """Return the position of the first token that the next query sees."""
        span = self.span(layer)
        return 0 if span is None else max(0, self.length - span + 1)

    def held_in_codes(self, layer: int, tensor: int) -> range:
        """Return the positions that are there, in codes."""
        sinks = self.plan.window.sink_tokens
        return range(max(sinks, self.oldest[layer, tensor]), sinks + self.coded[layer, tensor])

    def form(self, layer: int, tensor: int) -> TensorPlan:
        entry = self.plan.layers[layer]
        return entry.key if tensor == 0 else entry.value

    @property
    def length(self) -> int:
        return len(self.sequences[0]) if self.sequences else 0

    def settle(self, tokens: int) -> None:
        tokens = max(0, tokens)
        for place, coded in self.coded.items():
            self.coded[place] = max(coded, tokens_in_codes(tokens, self.form(*place), self.plan.window))
            self.oldest[place] = max(self.oldest[place], self.fresh_oldest(place, tokens))

    def fresh_oldest(self, place: tuple[int, int], tokens: int) -> int:
        """Return the oldest position that a cache of so many tokens holds."""
        return first_held(tokens, self.form(*place), self.plan.window, self.span(place[0]), self.tokens.head_dim)

    def append(self, new: list[list[int]]) -> None:
        if not self.sequences:
            self.sequences = [[] for _ in new]
        self.sequences = [old + more for old, more in zip(self.sequences, new, strict=True)]
        self.settle(self.length - RECORDED_TOKENS if self.recording else self.length)

    def can_crop(self, tokens: int) -> bool:
        """Whether what is held of so many tokens is what a cache holds that never saw the others."""
        if tokens == 0:
            return True
        sinks = self.plan.window.sink_tokens
        for place, oldest in self.oldest.items():
            fresh = sinks + tokens_in_codes(tokens, self.form(*place), self.plan.window)
            in_codes = [position for position in self.held_in_codes(*place) if position < tokens]
            if oldest > self.fresh_oldest(place, tokens) or any(position >= fresh for position in in_codes):
                return False
        return True

    def crop(self, tokens: int) -> None:
        self.sequences = [sequence[:tokens] for sequence in self.sequences]
        sinks = self.plan.window.sink_tokens
        self.coded = {place: min(coded, max(0, tokens - sinks)) for place, coded in self.coded.items()}
        if tokens == 0:
            self.oldest = dict.fromkeys(self.oldest, 0)
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
        return out[:, :, self.read_from(layer) :]

    def nbytes(self) -> int:
        if not self.recording:
            return self.plan.bytes_at(self.length, len(self.sequences))
        per_sequence = 0
        for place in self.coded:
            form, width = self.form(*place), HEADS * self.tokens.head_dim
            coded = len(self.held_in_codes(*place))
            per_sequence += (self.length - self.oldest[place] - coded) * width * 4 + -(-coded * width * form.bits // 8)
            if form.scheme == "rotated":
                per_sequence += coded * HEADS * 2
            elif form.axis == "token":
                per_sequence += coded * HEADS * -(-self.tokens.head_dim // form.group_size) * 4
            else:
                per_sequence += coded // form.group_size * width * 4
        return per_sequence * len(self.sequences)


def keys_of(head_dim: int) -> list[str]:
    return [name for name in KEYS if not (name.startswith("rot") and head_dim == 6)]


def values_of(head_dim: int) -> list[str]:
    return [name for name in VALUES if not (name.startswith("rot") and head_dim == 6)]


class Pair:
    """A cache and its model, to which the same is done."""

    def __init__(self, rng: random.Random, seed: int) -> None:
        self.rng = rng
        self.plan = self.make_plan()
        self.cache = self.make_cache()
        self.tokens = Tokens(self.plan, seed)
        self.model = PlainCache(self.plan, self.tokens)
        self.settled = 0
        """Tokens that were there when recording began, or that the last crop kept: they are held back no more."""

    def make_plan(self, head_dim: int = HEAD_DIM, span: int | None = None) -> BitPlan:
        """Return a random plan. span: of all layers, or of all but one."""
        rng = self.rng
        layers = [
            (
                tensor_plan(rng.choice(keys_of(head_dim)), "channel", head_dim, rng.choice([0.0, 0.0, 0.2])),
                tensor_plan(rng.choice(values_of(head_dim)), "token", head_dim, rng.choice([0.0, 0.0, 0.1])),
            )
            for _ in range(rng.choice([1, 2, 3]))
        ]
        window = (rng.choice([0, 1, 4, 8]), rng.choice([0, 1, 10, 128, 200]))
        spans: list[int | None] = [span] * len(layers)
        if span is not None and len(layers) > 1:
            spans[rng.randrange(len(layers))] = rng.choice([span, None])
        return hand_plan(layers, HEADS, (head_dim, head_dim), window, spans=spans)

    def make_cache(self) -> PlanCache:
        return hand_cache(self.plan)

    def do(self, name: str) -> None:
        getattr(self, name)()
        self.check()

    def append(self) -> None:
        count = self.rng.choice([1, 1, 1, 2, 7, 40, 130, self.rng.randint(1, 700)])
        batch = len(self.model.sequences) or self.rng.choice([1, 2, 3])
        new = [self.tokens.make(count) for _ in range(batch)]
        for layer in range(len(self.plan.layers)):
            seen = self.model.length - self.model.read_from(layer)
            assert self.cache.get_mask_sizes(count, layer) == (seen + count, self.model.read_from(layer))
            exact = [self.tokens.gather(layer, tensor, new) for tensor in range(2)]
            read = self.cache.update(*exact, layer)
            for tensor in range(2):
                assert torch.equal(read[tensor][:, :, -count:], exact[tensor])
                if self.model.sequences:
                    assert torch.equal(read[tensor][:, :, :-count], self.model.read(layer, tensor))
                assert read[tensor].shape[2] == seen + count
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
        wrong = torch.zeros(len(self.model.sequences) + 1, HEADS, 3, self.tokens.head_dim)
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
        self.model.oldest = dict.fromkeys(self.model.oldest, 0)
        self.model.recording = False
        self.settled = 0

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.model.length
        assert self.cache.nbytes() == self.model.nbytes()
        for layer, held in enumerate(self.cache.layers):
            assert held.get_seq_length() == self.model.length
            first = self.model.read_from(layer)
            assert self.cache.get_mask_sizes(5, layer) == (self.model.length - first + 5, first)
            for tensor, store in enumerate(held.stores):
                assert store.codes.tokens == len(self.model.held_in_codes(layer, tensor))
                assert store.oldest == self.model.oldest[layer, tensor]
                if self.model.sequences:
                    none = torch.empty(len(self.model.sequences), HEADS, 0, self.tokens.head_dim)
                    assert torch.equal(store.read(none), self.model.read(layer, tensor))


class SlidingPair(Pair):
    """A cache of layers that slide, of a model that such a cache can be loaded for."""

    def __init__(self, rng: random.Random, seed: int, folder: Path) -> None:
        self.folder = folder
        super().__init__(rng, seed)

    def make_plan(self, head_dim: int = HEAD_DIM, span: int | None = None) -> BitPlan:
        return super().make_plan(self.rng.choice([8, 8, 6, 4]), self.rng.choice([2, 3, 16, 17, 40, 150, 600]))

    def make_cache(self) -> PlanCache:
        assert self.plan.geometry is not None
        spans = [layer.window for layer in self.plan.geometry.layers]
        config = Gemma3TextConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=len(spans),
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=head_dim(self.plan),
            vocab_size=16,
            max_position_embeddings=100_000,
            sliding_window=max(span or 0 for span in spans) or 16,
            layer_types=["full_attention" if span is None else "sliding_attention" for span in spans],
        )
        self.owner = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return PlanCache.from_plan(self.plan, self.owner)

    def save_and_load(self) -> None:
        path = self.cache.save(self.folder / "cache.safetensors")
        self.cache = PlanCache.load(path, self.owner)

    def copy(self) -> None:
        """Go on with a copy; what becomes of the other changes nothing."""
        other, self.cache = self.cache, copy.deepcopy(self.cache)
        other.reset()


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


SLIDING_OPERATIONS = OPERATIONS | {"append_one_by_one": 5, "record": 2, "save_and_load": 3, "copy": 2}


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


@pytest.mark.parametrize("seed", range(0, SLIDING_SEQUENCES, 10))
def test_random_operations_on_layers_that_slide(seed: int, tmp_path: Path) -> None:
    """Some 2,500 of them, and each is checked: windows of 2 to 600 tokens, between texts of 1 to 700."""
    for number in range(seed, seed + 10):
        rng = random.Random(f"sliding {number}")
        pair = SlidingPair(rng, number, tmp_path)
        if rng.random() < 0.4:
            pair.do("record")
        pair.do("append")
        for name in rng.choices(list(SLIDING_OPERATIONS), list(SLIDING_OPERATIONS.values()), k=rng.randint(3, 10)):
            pair.do(name)
