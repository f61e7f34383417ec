"""The module for mlx-lm run in mlx-lm, where that is installed: every width, and the bytes of a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_exports import LAYERS, everywhere, plan_of

from kvprof.records.external_formats import MLX
from kvprof.records.formats import format_named
from kvprof.runtime import fake_quantize
from kvprof.targets.mlx_lm import write

mx = pytest.importorskip("mlx.core", reason="mlx has no wheel for every machine")
pytest.importorskip("mlx_lm")

TOKENS = 7


class Model:
    """What `make_prompt_cache` asks a model for."""

    layers = range(LAYERS)


def planned_cache(name: str, dtype: str) -> list[Any]:
    namespace: dict[str, Any] = {}
    exec(compile(write(plan_of(everywhere(name, name), dtype=dtype)).text, "artefact", "exec"), namespace)
    return namespace["planned_cache"](Model())


@pytest.mark.parametrize("name", MLX)
def test_every_width_holds_the_plans_bytes_and_gives_back_what_was_predicted(name: str) -> None:
    form = MLX[name]
    assert form.of_dtype is not None
    states = np.random.default_rng(0).standard_normal((1, 2, TOKENS, 128)).astype(np.float32)
    given = mx.array(states).astype(getattr(mx, form.of_dtype))
    cache = planned_cache(name, form.of_dtype)[0]
    for token in range(TOKENS):
        one = given[:, :, token : token + 1]
        keys, _ = cache.update_and_fetch(one, one)
    held = cache.nbytes / cache.keys[0].shape[2]  # room is made for 256 tokens at a time
    assert held == 2 * 2 * 128 * form_bits(name) / 8
    restored = np.array(mx.dequantize(*keys, group_size=form.block, bits=form.bits).astype(mx.float32))
    exact = torch.from_numpy(np.array(given.astype(mx.float32)))
    expected = fake_quantize(exact, format_named(name, "key", 128)).numpy()
    np.testing.assert_array_equal(restored, expected)


def form_bits(name: str) -> float:
    return float(format_named(name, "key", 128).stored_bits(128))
