"""Latent attention (MLA) in a PlanCache: the latent and its rotary part are rounded, keys and values made of them.

The truth for the cache is a slow one that keeps full precision and rounds all anew (tiny_plans.py); for one forward it
is decoding token by token, through the model's own code.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from shrunk import build as build_type
from tiny_plans import FULL, MIXED, NaiveLayer, build, plan_for, prompt, step
from torch import Tensor
from transformers import CONFIG_MAPPING, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvprof.errors import CacheError, Mismatch
from kvprof.models.inventory import take_inventory
from kvprof.records.plan import BitPlan, LayerPlan
from kvprof.runtime.attention.patch import _active
from kvprof.runtime.attention.reference import decoding_reads
from kvprof.runtime.cache import PlanCache

INDEXED = "deepseek-v32"
OPERATIONS = {
    "append": 8,
    "reorder": 2,
    "select": 2,
    "repeat": 2,
    "crop": 4,
    "record": 1,
    "reset": 1,
    "save": 2,
    "copy": 1,
}


def of_type(kind: str) -> PreTrainedModel:
    """Build a tiny model of a type in float64, so that no code is a toss-up between two ways to add."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model = build_type(kind).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize(
    "kind",
    [
        "deepseek_v32",  # an indexer selects what is read
        "glm_moe_dsa",  # layers read what an earlier layer's indexer selected
        "kimi_linear",  # with recurrent layers between
        "longcat_flash",  # two attentions a block
        "mistral_large4",  # the last layer has no rotary part, and is left alone
        "minicpm3",
    ],
)
def test_one_forward_reads_what_decoding_through_the_cache_reads(kind: str) -> None:
    model, ids = of_type(kind), prompt(50)
    exact = model(ids).logits
    plan = plan_for(model, [("int2g4c", "rot2"), ("int3g8", "int4g8")], (2, 6), fraction=0.1)
    cache = PlanCache.from_plan(plan, model)
    alone = torch.cat([step(model, piece, cache) for piece in ids.split(1, dim=1)], dim=1)
    with decoding_reads(model, plan):
        whole = model(ids).logits
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)
    assert float((whole - exact).abs().max()) > 1e-3
    assert cache.nbytes() == cache.plan.bytes_at(50)
    assert not _active
    assert not any("expand_kv" in vars(module) for module in model.modules())


def test_a_gradient_passes_through_the_rounding_of_latents() -> None:
    model, ids = of_type("deepseek_v3"), prompt(30)
    plan = plan_for(model, MIXED)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    with decoding_reads(model, plan):
        model(inputs_embeds=embedded).logits.square().sum().backward()
    assert float(embedded.grad[:, 3].abs().max()) > 0


def test_sixteen_bits_give_the_logits_of_transformers_own_cache() -> None:
    model = build(INDEXED)
    ours, theirs = PlanCache.from_plan(plan_for(model, FULL), model), DynamicCache(config=model.config)
    for ids in torch.split(prompt(60, 2), [12, 1, 9, *[1] * 20, 10, *[1] * 8], dim=1):
        assert torch.equal(step(model, ids, ours), step(model, ids, theirs))
        assert ours.nbytes() == ours.plan.bytes_at(ours.get_seq_length(), 2)


def test_a_plan_of_keys_and_values_is_none_of_latents() -> None:
    model = build(INDEXED)
    plan = plan_for(model, MIXED)
    layers = tuple(LayerPlan(layer=entry.layer, key=entry.key, value=entry.value) for entry in plan.layers)
    wrong = plan.model_copy(update={"layers": layers, "geometry": None})
    with pytest.raises(Mismatch, match="names key and value of layer 0, which has latent and rope"):
        PlanCache.from_plan(wrong, model)


# Random operations


def naive_indexed() -> type[DynamicLayer]:
    from transformers.cache_utils import DynamicIndexedLayer

    return type("NaiveIndexedLayer", (NaiveLayer, DynamicIndexedLayer), {})


class Pair:
    """A PlanCache of a model with an indexer, and the slow cache: both are given the same random numbers."""

    def __init__(self, model: PreTrainedModel, plan: BitPlan, rng: random.Random, folder: Path) -> None:
        self.model, self.plan, self.rng, self.folder = model, plan, rng, folder
        self.generator = torch.Generator().manual_seed(rng.randrange(2**30))
        self.cache = PlanCache.from_plan(plan, model)
        self.slow = Cache(layers=[naive_indexed()(plan, entry, None) for entry in plan.layers])
        self.batch = rng.choice([1, 2, 3])

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def append(self) -> None:
        tokens = self.rng.choice([1, 1, 1, 2, 5, 17])
        for layer in range(len(self.plan.layers)):
            latent, rope = self.random(self.batch, 1, tokens, 16), self.random(self.batch, 1, tokens, 4)
            indexed = self.random(self.batch, tokens, 8)
            found, wanted = (cache.update(latent, rope, layer) for cache in (self.cache, self.slow))
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one, other)
            assert torch.equal(*(cache.update_indexer(indexed, layer) for cache in (self.cache, self.slow)))

    def reorder(self) -> None:
        chosen = torch.tensor([self.rng.randrange(self.batch) for _ in range(self.batch)])
        for cache in (self.cache, self.slow):
            cache.reorder_cache(chosen)

    def select(self) -> None:
        chosen = torch.tensor(self.rng.sample(range(self.batch), self.rng.randint(1, self.batch)))
        for cache in (self.cache, self.slow):
            cache.batch_select_indices(chosen)
        self.batch = len(chosen)

    def repeat(self) -> None:
        if self.batch <= 2:
            for cache in (self.cache, self.slow):
                cache.batch_repeat_interleave(2)
            self.batch *= 2

    def crop(self) -> None:
        remove = self.rng.randint(0, min(12, self.cache.get_seq_length() - 1))
        try:
            self.cache.crop(-remove)
        except CacheError:  # it would need what was rounded away, and is as it was: what comes next shows it
            return
        self.slow.crop(-remove)

    def record(self) -> None:
        for cache in (self.cache, self.slow):
            cache.activate_past_recording()

    def reset(self) -> None:
        self.cache.reset()
        self.slow = Cache(layers=[naive_indexed()(self.plan, entry, None) for entry in self.plan.layers])
        self.batch = self.rng.choice([1, 2, 3])
        self.append()

    def save(self) -> None:
        self.cache = PlanCache.load(self.cache.save(self.folder / "cache.safetensors"), self.model)

    def copy(self) -> None:
        other, self.cache = self.cache, copy.deepcopy(self.cache)
        other.reset()


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_on_latents_with_an_indexer(seed: int, tmp_path: Path) -> None:
    """Two thousand of them; what is read after each is what the slow cache reads, and its bytes are the plan's."""
    rng = random.Random(f"latent {seed}")
    model = build(INDEXED)
    formats = rng.sample([("int2g4c", "rot2"), ("int3g8", "int4g8"), ("rot3", "int1g4"), ("full", "int5g2")], 2)
    plan = plan_for(model, formats, (rng.choice([0, 2, 4]), rng.choice([0, 1, 6, 20])))
    pair = Pair(model, plan, rng, tmp_path)
    pair.append()
    recording = False
    for name in rng.choices(list(OPERATIONS), list(OPERATIONS.values()), k=100):
        if recording and name in ("record", "save"):  # a slow cache that records settles by itself alone
            continue
        recording = (recording or name == "record") and name != "reset"
        getattr(pair, name)()
        tokens = pair.slow.get_seq_length()
        assert pair.cache.get_seq_length() == tokens
        if not recording:
            assert pair.cache.nbytes() == pair.cache.plan.bytes_at(tokens, pair.batch)
        if tokens > 200:
            pair.reset()
            recording = False


def test_a_cache_whose_indexer_was_cut_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = build(INDEXED)
    cache = PlanCache.from_plan(plan_for(model, MIXED), model)
    step(model, prompt(30), cache)
    path = cache.save(tmp_path / "cache.safetensors")
    with safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["layers.1.indexer"] = tensors["layers.1.indexer"][:, 1:].contiguous()
    save_file(tensors, path, metadata=header)
    with pytest.raises(Exception, match="the indexer of layer 1 holds no"):
        PlanCache.load(path, model)


def test_a_layer_with_an_indexer_that_is_left_alone_is_saved_too(tmp_path: Path) -> None:
    model = of_type("mistral_large4").float()
    plan = plan_for(model, MIXED)
    assert plan.skipped
    ids = prompt(30)
    cache, whole = PlanCache.from_plan(plan, model), PlanCache.from_plan(plan, model)
    step(model, ids[:, :20], cache)
    again = PlanCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    step(model, ids[:, :20], whole)
    assert torch.equal(step(model, ids[:, 20:], again), step(model, ids[:, 20:], whole))


def test_latents_are_counted_with_the_indexer_s_keys() -> None:
    model = build(INDEXED)
    geometry = take_inventory(model.config).geometry
    plan = plan_for(model, [("int4g4", "rot3")], (0, 0))
    # 16 numbers in 4 bits with 32 for each group of 4 tokens, 4 in 3 bits with 16 a token, 8 of the indexer in 32
    assert plan.bytes_at(400) == 2 * 400 * (16 * (4 + 32 / 4) + (4 * 3 + 16) + 8 * 32) / 8
    assert geometry.bytes_at(400) == 2 * 400 * (16 + 4 + 8) * 4
