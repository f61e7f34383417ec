"""What a cache costs: in tensors, in the memory of the process, in bytes moved to append a token."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from handplans import bytes_within, hand_cache, hand_plan, tensor_plan
from tiny import tiny_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kvprof.runtime.cache import PlanCache
from kvprof.runtime.history import PAGE_TOKENS
from kvprof.runtime.layers import PlannedLayer

TOKENS = 3000
LAYERS, HEADS, HEAD_DIM = 30, 3, 64
"""The demo model's."""


class Written(TorchDispatchMode):
    """Counts the bytes that operations write: of every result that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        listed = results if isinstance(results, (tuple, list)) else [results]
        if not any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns):
            self.bytes += sum(x.numel() * x.element_size() for x in listed if isinstance(x, Tensor))
        return results


# ---- appending


@pytest.mark.parametrize("name", ["int3g32", "int1g5", "rot2", "full"])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_what_a_token_costs_to_append_does_not_grow_with_the_context(name: str, axis: str) -> None:
    head_dim = 16 if name.startswith("rot") else 20  # 20 channels of 1 or 3 bits fill no whole bytes
    form, written = tensor_plan(name, axis, head_dim), []
    for context in (1024, 17408):  # the same distance from a block's end
        cache = hand_cache(hand_plan([(form, form)], 1, (head_dim, head_dim), (4, 128)))
        store = cache.layers[0].key
        store.append(torch.randn(1, 1, context, head_dim))
        store.settle()
        token = torch.randn(1, 1, 1, head_dim)
        with Written() as counter:
            for _ in range(PAGE_TOKENS):
                store.append(token)
                store.settle()
        written.append(counter.bytes)
    assert max(written) <= 1.1 * min(written)
    assert max(written) / PAGE_TOKENS < 8 * PAGE_TOKENS * head_dim * 4  # of the token's own size, a few blocks


def test_appending_counts_what_it_writes() -> None:
    """The counter sees a copy, and takes no view for one."""
    x = torch.zeros(4, 8)
    with Written() as counter:
        x[1:].transpose(0, 1)
        assert counter.bytes == 0
        torch.cat([x, x])
        assert counter.bytes == 2 * 4 * 8 * 4
        x.add_(1)
        assert counter.bytes == 3 * 4 * 8 * 4


# ---- reading


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen3", "gpt2", "falcon-mqa"])
def test_no_unpacked_history_outlives_its_layers_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    others = [
        x for x in gc.get_objects() if issubclass(type(x), Tensor)
    ]  # other tests', held so that no id comes again
    model = tiny_model(name)
    cache = planned_cache(model)
    read: list[StorageWeakRef] = []
    update = PlannedLayer.update

    def watched(layer: PlannedLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert all(storage.expired() for storage in read)  # what the layer before read is gone by now
        result = update(layer, *args, **kwargs)
        read.extend(StorageWeakRef(x.untyped_storage()) for x in result)
        return result

    monkeypatch.setattr(PlannedLayer, "update", watched)
    ids = torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(0))
    gc.disable()  # gone at once, not when a collector comes by
    try:
        for piece in torch.split(ids, [50, 1, 1, 8], dim=1):
            model(piece, past_key_values=cache)
            assert len(read) > 0
            assert all(storage.expired() for storage in read)
    finally:
        gc.enable()
    gc.collect()
    own = {id(x) for layer in cache.layers for x in layer.tensors()} | {id(x) for x in others}
    weights = {id(x) for x in (*model.parameters(), *model.buffers())}
    width = cache.layers[0].shape.key_width
    history = [
        x
        for x in gc.get_objects()
        if issubclass(type(x), Tensor) and id(x) not in own | weights and x.dim() == 4 and x.numel() >= 50 * width
    ]
    assert history == []


def planned_cache(model: Any) -> PlanCache:
    """Return a cache of 2 and 3 bits with hardly a window."""
    from kvprof.models.inventory import take_inventory

    geometry = take_inventory(model.config).geometry
    shape = geometry.layers[0]
    layers = [
        (tensor_plan("int3g8", "channel", shape.key_head_dim), tensor_plan("rot2", "token", shape.value_head_dim))
    ]
    plan = hand_plan(layers * geometry.num_layers, shape.kv_heads, (shape.key_head_dim, shape.value_head_dim), (1, 2))
    return PlanCache.from_plan(plan, model)


# ---- 3,000 tokens of the demo model

PLANNED = [(tensor_plan("int3g32", "channel", HEAD_DIM), tensor_plan("int2g32", "token", HEAD_DIM))] * LAYERS
"""2.5 bits of code an element, 3.5 stored."""


@pytest.mark.parametrize(
    ("recent", "times"),
    [(0, 4.49), (16, 4.45), (20, 4.44), (32, 4.33), (128, 3.91)],
)
def test_a_plan_of_two_and_a_half_bits_is_so_many_times_smaller_than_sixteen(recent: int, times: float) -> None:
    """16 / 3.5 is 4.57; the window, at full size, costs the rest."""
    plan = hand_plan(PLANNED, HEADS, (HEAD_DIM, HEAD_DIM), (4, recent), "bfloat16")
    cache = hand_cache(plan)
    x = torch.randn(1, HEADS, TOKENS, HEAD_DIM, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        cache.update(x, x, layer)
    sixteen_bits = LAYERS * 2 * x.numel() * 2
    assert bytes_within(cache) == cache.nbytes() == plan.bytes_at(TOKENS)
    assert sixteen_bits / bytes_within(cache) >= times


MEASURE = """
import ctypes, gc, json, os, sys
sys.path[:0] = sys.argv[1:3]
import torch
from transformers import DynamicCache
from handplans import bytes_within, hand_plan
from kvprof.models.load import load_model, resolve
from kvprof.runtime import PlanCache
from test_cache_memory import HEAD_DIM, HEADS, PLANNED, TOKENS

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
model = load_model(resolve("demo"), "float32", "cpu")
ids = torch.randint(0, 40000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
plan = hand_plan(PLANNED, HEADS, (HEAD_DIM, HEAD_DIM), (4, 16))

def fill(cache, tokens):
    for piece in torch.split(ids[:, :tokens], 500, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return cache

with torch.inference_mode():
    for empty in (DynamicCache(), PlanCache.from_plan(plan, model)):
        fill(empty, 600)  # what torch and the model allocate for themselves
    del empty
    start = resident()
    ours = PlanCache.from_plan(plan, model)
    for layer in range(model.config.num_hidden_layers):
        ours.update(*torch.randn(2, 1, HEADS, TOKENS - 1, HEAD_DIM), layer)
    model(ids[:, -1:], past_key_values=ours)  # a step of decoding, that reads it all
    after_ours = resident()
    counted = {"ours": ours.nbytes(), "tensors": bytes_within(ours), "promised": plan.bytes_at(TOKENS)}
    del ours
    after_none = resident()
    theirs = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        theirs.update(*torch.randn(2, 1, HEADS, TOKENS, HEAD_DIM), layer)
    after_theirs = resident()
    counted["theirs"] = bytes_within(theirs)
print(json.dumps(counted | {"resident ours": after_ours - start, "resident theirs": after_theirs - after_none,
                            "resident none": after_none - start}))
"""


@pytest.mark.demo
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, trims glibc's heap")
def test_the_process_shrinks_as_its_tensors_do_at_3000_tokens_of_the_demo_model() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(here), str(here.parent)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["ours"] == found["tensors"] == found["promised"]
    assert found["theirs"] >= 8 * found["ours"]  # 4 bytes an element; the window costs its share
    assert found["resident ours"] < 1.5 * found["ours"]
    assert found["resident theirs"] > 5 * found["resident ours"]
