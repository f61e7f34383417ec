"""Are effects for which no attention output is made those of whole outputs, in every family?

The reference asks the layer's own attention once a format (output_effects.py); its outputs are what decoding reads, by
the tests of decoding_reads.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from test_loss_increase import WINDOW, batch_of, effects_of, formats_for
from tiny import LATENTS, TINY, UNUSUAL, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.profile import loss_increase as losses
from kvprof.profile.decoder import Formats
from kvprof.profile.loss_increase import Effects
from kvprof.records.formats import TensorName
from kvprof.records.plan import Window
from kvprof.runtime.attention.logits import logits_of

NAMES: dict[TensorName, tuple[str, ...]] = {
    "key": ("full", "int2g4", "int3g8c", "int8g4", "rot2"),
    "value": ("full", "int2g4", "rot1", "int8g4"),
}
FLOAT32_INSIDE = {"codegen", "gemma2", "gptj"}
"""Families that compute scores or weights in float32 whatever the model is in: 8 bits change their outputs by little
more than that rounds them."""


def build(name: str) -> PreTrainedModel:
    model = tiny_model(name).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def by_outputs(
    model: PreTrainedModel, formats: Formats, patch: pytest.MonkeyPatch, *lengths: int, window: Window = WINDOW
) -> Effects:
    with patch.context() as patched:
        patched.setattr(losses, "logits_of", lambda *_: None)
        return effects_of(model, batch_of(*lengths), formats, window=window)


def assert_same(found: Effects, expected: Effects, relative: float) -> None:
    assert set(found) == set(expected)
    for key, rows in expected.items():
        for one, other in zip(found[key], rows, strict=True):
            size = math.sqrt(float(other.square().mean()))
            assert (size > 0) == (key[2] != "full")
            torch.testing.assert_close(
                one, other, rtol=0, atol=relative * size, msg=lambda told, key=key: f"{key} {told}"
            )


@pytest.mark.parametrize("name", dict.fromkeys([*TINY, *UNUSUAL, *LATENTS]))
def test_effects_are_those_of_whole_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    formats = formats_for(model, NAMES)
    told: list[bool] = []

    def watched(*given: Any) -> Any:
        logits = logits_of(*given)
        told.append(logits is not None)
        return logits

    monkeypatch.setattr(losses, "logits_of", watched)
    found = effects_of(model, batch_of(41, 33), formats)
    assert told
    assert all(told)
    assert_same(found, by_outputs(model, formats, monkeypatch, 41, 33), 2e-2 if name in FLOAT32_INSIDE else 1e-8)


@pytest.mark.parametrize("recent_tokens", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "mistral"])
def test_own_tokens_read_as_stored(name: str, recent_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    window = Window(sink_tokens=0, recent_tokens=recent_tokens, own_token_stored=True)
    formats = formats_for(model, {"key": ("full", "int2g4", "rot2"), "value": ("full", "int2g4", "rot1")})
    found = effects_of(model, batch_of(41, 33), formats, window=window)
    expected = by_outputs(model, formats, monkeypatch, 41, 33, window=window)
    assert_same(found, expected, 2e-2 if name in FLOAT32_INSIDE else 1e-8)
    exact = effects_of(model, batch_of(41, 33), formats, window=window.with_own_token_exact)
    assert any(not torch.allclose(found[key][0], exact[key][0], rtol=1e-3) for key in found if key[2] != "full")


def test_attention_that_does_anything_else_is_asked_for_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose outputs keys scale once more, say: no option tells."""
    model = build("llama")
    module = sys.modules[type(model).__module__]
    eager = vars(module)["eager_attention_forward"]

    def odd(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        output, weights = eager(layer, query, key, value, mask, **options)
        return output * (1 + key.mean((1, 2, 3))[:, None, None, None]), weights

    formats = formats_for(model, NAMES)
    plain = effects_of(model, batch_of(41), formats)
    monkeypatch.setattr(module, "eager_attention_forward", odd)
    model.set_attn_implementation("eager")
    found = effects_of(model, batch_of(41), formats)
    assert_same(found, by_outputs(model, formats, monkeypatch, 41), 1e-12)
    assert any(not torch.allclose(found[key][0], plain[key][0], rtol=1e-3) for key in found if key[2] != "full")


def test_logits_that_a_format_moves_by_hundreds_overflow_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of large numbers in few bits: in float32, exp of what a logit moves by is no number."""
    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.k_proj.weight.data.mul_(100)
        block.self_attn.q_proj.weight.data.mul_(100)
    formats = formats_for(model, {"key": ("int1g4", "rot1"), "value": ("int2g4",)})
    found = effects_of(model, batch_of(41), formats)
    assert all(bool(rows[0].isfinite().all()) for rows in found.values())
    assert_same(found, by_outputs(model, formats, monkeypatch, 41), 1e-3)
