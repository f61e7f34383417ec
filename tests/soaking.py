"""A long life for a cache and for a measurement, watched: bytes as promised, numbers as a reference has them, no leak.

Used by the suite with small numbers and by `tests/benchmarks/soak.py` with large ones. The reference of decoding is
`runtime/reference.py`, NumPy from the formulas of the design; that of the operations is the plain model of a cache in
`runtime/test_cache_operations.py`.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "runtime"))

from handplans import bytes_within, hand_cache, hand_plan, tensor_plan
from reference import rounded, tokens_in_codes
from test_cache_operations import HEAD_DIM, HEADS, OPERATIONS, Pair, Tokens
from tiny import tiny_model
from tiny_plans import build

from kvprof.calibration.sequences import CalibrationSet
from kvprof.models.inventory import take_inventory
from kvprof.profile.decoder import Decoder, formats_of
from kvprof.profile.scoring import measure_sensitivity
from kvprof.records.plan import Window
from kvprof.records.scores import CalibrationInfo
from kvprof.runtime.cache import PlanCache

LONGEST = 1200
"""Tokens at which the cache of the operations is emptied, so that what it may hold has an end."""

FORMATS = [("int3g16", "rot2"), ("int2g32c", "int4g8"), ("int8g20", "int1g8c")]
"""Of keys and values, layer by layer: both schemes, clipped and plain, groups that fill no page."""


@dataclass(frozen=True)
class Memory:
    """What a process held each time it was asked. blocks: small objects of Python's; resident: bytes of all."""

    at: tuple[int, ...]
    blocks: tuple[int, ...]
    resident: tuple[int, ...]

    def slope(self, which: str) -> float:
        """Return what a step adds, by least squares over the later half, where all is warm."""
        half = len(self.at) // 2
        return float(np.polyfit(self.at[half:], getattr(self, which)[half:], 1)[0])


class Watch:
    """Asks for the memory now and then; collects garbage and gives the heap's free ends back first.

    Python's objects are counted, not traced: that would take as long again as what is watched.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int]] = []

    def look(self, step: int) -> None:
        """Note what is held after so many steps."""
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        self._rows.append((step, sys.getallocatedblocks(), resident_bytes()))

    @property
    def memory(self) -> Memory:
        """All that was noted."""
        return Memory(*map(tuple, zip(*self._rows, strict=True)))


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# ---- decoding


@dataclass(frozen=True)
class Decoded:
    """What a long decoding showed. furthest: at each look, from the reference, as a share of the largest number."""

    steps: int
    furthest: tuple[float, ...]
    memory: Memory


def decode(steps: int, looks: int, seed: int, progress: Callable[[int], None] = lambda done: None) -> Decoded:
    """Decode token by token; assert the promised bytes at each step, and at each look that no tensor is unpromised.

    Every look compares all that is read with the reference, from the numbers that were given; a drift would grow.
    """
    layers = [(tensor_plan(key, "channel", HEAD_DIM), tensor_plan(value, "token", HEAD_DIM)) for key, value in FORMATS]
    plan = hand_plan(layers, HEADS, (HEAD_DIM, HEAD_DIM), (4, 37))
    cache = hand_cache(plan)
    given = torch.randn(len(layers), 2, HEADS, steps, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    furthest = []
    watch = Watch()
    for step in range(steps):
        for layer in range(len(layers)):
            keys, values = given[layer, :, None, :, step : step + 1]
            read = cache.update(keys, values, layer)
            assert read[0].shape == read[1].shape == (1, HEADS, step + 1, HEAD_DIM)
        del read
        assert cache.nbytes() == plan.bytes_at(step + 1)
        if (step + 1) % max(1, steps // looks) == 0:
            assert bytes_within(cache) == plan.bytes_at(step + 1)
            furthest.append(_furthest(cache, given[:, :, :, : step + 1].numpy()))
            watch.look(step + 1)
            progress(step + 1)
    return Decoded(steps, tuple(furthest), watch.memory)


def _furthest(cache: PlanCache, given: np.ndarray) -> float:
    """Return how far what the cache gives back is from the reference. given: (layers, 2, H, T, D)."""
    most = 0.0
    window = cache.plan.window
    for entry, layer, exact in zip(cache.plan.layers, cache.layers, given, strict=True):
        for form, store, expected in zip((entry.key, entry.value), layer.stores, exact.copy(), strict=True):
            first = window.sink_tokens
            last = first + tokens_in_codes(expected.shape[1], form, window)
            assert store.codes.tokens == last - first
            if last > first:
                expected[:, first:last] = rounded(expected[:, first:last], form, cache.plan.quantizer)
            found = store.read(torch.empty(1, HEADS, 0, HEAD_DIM))[0].numpy()
            most = max(most, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return most


# ---- operations


class LongPair(Pair):
    """A cache and its model, to which the same is done for so long that both are emptied now and then."""

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(random.Random(seed), seed)
        self.file = folder / "cache.safetensors"
        self.built = build("llama", num_hidden_layers=len(self.plan.layers))

    def save_and_load(self) -> None:
        self.cache.save(self.file)
        self.cache = PlanCache.load(self.file, self.built)

    def copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    def reset(self) -> None:
        super().reset()
        self.tokens = self.model.tokens = Tokens(self.plan, self.rng.randrange(2**31))


LONG_OPERATIONS = OPERATIONS | {"save_and_load": 2, "copy": 1}


def operate(
    operations: int, looks: int, seed: int, folder: Path, progress: Callable[[int], None] = lambda done: None
) -> tuple[dict[str, int], Memory]:
    """Do random things to a cache, each compared with the plain model; return how often each, and the memory.

    A cache of LONGEST tokens is emptied; before every look, too, so that all looks are of the same state.
    """
    counts = dict.fromkeys(LONG_OPERATIONS, 0)
    pair = LongPair(seed, folder)
    names = random.Random(seed + 1).choices(list(LONG_OPERATIONS), list(LONG_OPERATIONS.values()), k=operations)
    watch = Watch()
    for number, name in enumerate(names, 1):
        if pair.model.length > LONGEST:
            pair.do("reset")
        pair.do(name)
        counts[name] += 1
        assert bytes_within(pair.cache) == pair.model.nbytes()
        if number % max(1, operations // looks) == 0:
            pair.do("reset")
            watch.look(number)
            progress(number)
    return counts, watch.memory


# ---- measuring


def measure(
    batches: int, looks: int, seed: int, losses: bool, progress: Callable[[int], None] = lambda done: None
) -> Memory:
    """Measure gradient norms, and losses where asked for, of so many batches of two sequences; return the memory."""
    model = tiny_model("llama")
    inventory = take_inventory(model.config)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 33, (2 * batches,), generator=generator).tolist()
    sequences = tuple(tuple(torch.randint(1, 96, (length,), generator=generator).tolist()) for length in lengths)
    info = CalibrationInfo(dataset="random", sequences=len(lengths), sequence_length=32, tokens=sum(lengths), seed=seed)
    decoder = Decoder({"key": ("int2g4", "rot2"), "value": ("int3g8",)}, Window(sink_tokens=1, recent_tokens=4), 0.5)
    formats = formats_of(inventory.geometry, decoder) if losses else None
    done = 0
    watch = Watch()

    def finished(results: object) -> None:
        nonlocal done
        done += 1
        if done % max(1, batches // looks) == 0:
            watch.look(done)
            progress(done)

    measure_sensitivity(
        model, CalibrationSet(sequences, info, 0), inventory, formats, decoder, batch_size=2, finished=finished
    )
    assert done == batches
    return watch.memory
