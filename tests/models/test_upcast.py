"""A model in half precision whose blocks compute in float32 has the scores of the model cast to float32 as a whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_streaming import losses_of, ragged, save
from tiny import TINY, tiny_model
from transformers import PreTrainedModel

from kvprof.errors import UnsupportedAttention
from kvprof.models.execution import upcast as widening
from kvprof.models.execution.upcast import computing_in_float32
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model
from kvprof.profile.gradients import gradient_norms


def half_and_whole(model: PreTrainedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    half = copy.deepcopy(model).to(dtype)
    return half, copy.deepcopy(half).float()


def assert_left_as_found(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> None:
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_architecture_has_the_gradients_and_losses_of_float32(
    any_tiny: tuple[str, PreTrainedModel], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widening, "CAST_AT_ONCE", 32 * 10)  # the head in pieces
    half, whole = half_and_whole(any_tiny[1], dtype)
    geometry, batch = take_inventory(whole.config).geometry, ragged()
    before = dict(half.named_parameters())
    expected = gradient_norms(whole, geometry, batch)
    with computing_in_float32(half):
        got = gradient_norms(half, geometry, batch)
    assert_left_as_found(half, before)
    for index in expected:
        torch.testing.assert_close(torch.tensor(got[index]), torch.tensor(expected[index]), rtol=1e-5, atol=0)
    try:
        losses = losses_of(whole, batch)
    except UnsupportedAttention:
        return
    with computing_in_float32(half):
        for key, loss_B in losses_of(half, batch).items():
            torch.testing.assert_close(loss_B, losses[key], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_streamed_model_computes_the_same_as_one_in_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPROF_CACHE", str(tmp_path / "cache"))
    source = save(tiny_model(name).to(torch.bfloat16), tmp_path / "model")
    half, streamed = (load_model(source, "auto", "cpu", stream) for stream in (False, True))
    geometry, batch = take_inventory(half.config).geometry, ragged()
    with computing_in_float32(half), computing_in_float32(streamed):
        assert gradient_norms(streamed, geometry, batch) == gradient_norms(half, geometry, batch)
    assert streamed.dtype == torch.bfloat16
    with torch.no_grad():  # and afterwards in half precision again
        assert streamed(batch.input_ids).logits.dtype == half(batch.input_ids).logits.dtype == torch.bfloat16


def test_one_block_at_a_time_is_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY["llama"]()
    config.num_hidden_layers = 6
    half = type(tiny_model("llama"))(config).eval().requires_grad_(False).to(torch.bfloat16)
    wide = []

    def count(*_: object) -> None:
        wide.append(sum(layer.mlp.up_proj.weight.dtype == torch.float32 for layer in half.model.layers))

    for layer in half.model.layers:
        layer.mlp.up_proj.register_forward_hook(count)
    with computing_in_float32(half):
        gradient_norms(half, take_inventory(config).geometry, ragged())
    assert wide == [1] * 12  # each on the way there, and on the way back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_in_full_precision_is_left_alone(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    with computing_in_float32(model):
        assert not any("forward" in vars(module) for module in model.modules())
        with torch.no_grad():
            assert model(ragged().input_ids).logits.dtype == dtype
