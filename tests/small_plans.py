"""Fixtures of what evaluations and benchmarks share: a tiny model with words of its own, and plans for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from folders import save_folder, save_text
from threads import one_thread  # noqa: F401

from kvprof.models.config import load_config
from kvprof.models.inventory import take_inventory
from kvprof.models.load import resolve
from kvprof.models.source import ModelSource
from kvprof.records.formats import Format
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, LayerPlan, ModelInfo, Quantizer, TensorPlan, Window

SMALL_WINDOW = Window(sink_tokens=1, recent_tokens=4)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    """A tiny Llama of two layers, two KV heads of 8, and 64 positions."""
    return resolve(str(save_folder(tmp_path / "model")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file of rows, to be packed into windows."""
    return str(save_text(tmp_path / "text.txt", rows=60))


@pytest.fixture
def geometry(source: ModelSource) -> CacheGeometry:
    """What the tiny Llama caches."""
    return take_inventory(load_config(source), source.id).geometry


@pytest.fixture
def make_plan(source: ModelSource, geometry: CacheGeometry) -> Callable[..., BitPlan]:
    """Make a plan of one format for all keys and one for all values; the window is small, so that codes are read."""

    def make(bits_key: int, bits_value: int, window: Window = SMALL_WINDOW) -> BitPlan:
        key = TensorPlan(**Format(bits=bits_key, group_size=4, axis="channel").model_dump())
        value = TensorPlan(**Format(bits=bits_value, group_size=8, axis="token").model_dump())
        return BitPlan(
            model=ModelInfo(id=source.id, num_layers=2),
            quantizer=Quantizer(),
            window=window,
            geometry=geometry,
            layers=tuple(LayerPlan(layer=layer, key=key, value=value) for layer in range(2)),
        )

    return make
