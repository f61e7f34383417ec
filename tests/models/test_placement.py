"""Where a model is loaded: one device where it fits, all there are where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folders import save_folder
from tiny import TINY, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kvprof.calibration.sequences import batches
from kvprof.errors import UsageError
from kvprof.models import load
from kvprof.models.identity import live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.profile.gradients import gradient_norms

SEQUENCES = [(5, 9, 2, 7, 30, 11, 4, 8), (3, 1, 4, 1, 5)]


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_bytes_of_the_weights_are_counted_without_them(name: str) -> None:
    parameters = {id(p): p for p in tiny_model(name).parameters()}.values()
    counted = load.weight_bytes(TINY[name](), "bfloat16")
    expected = sum(p.numel() for p in parameters) * 2
    assert counted == expected  # tied embeddings are there once


@pytest.mark.parametrize(("free_bytes", "fits"), [(10**9, True), (10**4, False)])
def test_a_gpu_takes_the_whole_model_only_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))
    for counter in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, counter, lambda device: 0)
    placement = load._placement("auto", TINY["llama"](), "auto")
    assert placement == (torch.device("cuda:0") if fits else None)


@pytest.mark.parametrize("spread", [True, False])
def test_accelerate_is_asked_only_for_a_model_that_does_not_fit(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, spread: bool
) -> None:
    source = load.resolve(str(save_folder(in_tmp / "model")))
    monkeypatch.setattr(load, "_placement", lambda *_: None if spread else torch.device("cpu"))
    asked: list[dict[str, object]] = []
    real = LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(
        LlamaForCausalLM, "from_pretrained", lambda *args, **kwargs: asked.append(kwargs) or real(*args, **kwargs)
    )
    load.load_model(source)
    assert [call.get("device_map") for call in asked] == ["auto" if spread else None]


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpuu"])
def test_an_impossible_device_is_named(in_tmp: Path, device: str) -> None:
    source = load.resolve(str(save_folder(in_tmp / "model")))
    with pytest.raises(UsageError, match=device):
        load.load_model(source, device=device)


def test_gradients_of_an_offloaded_model_are_those_of_a_whole_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=places | dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.1"), "disk"),
        offload_folder=tmp_path / "offload",
    ).eval()
    offloaded.requires_grad_(False)
    geometry = take_inventory(model.config).geometry
    assert live_fingerprint(offloaded, geometry) is None
    (batch,) = batches(SEQUENCES, 2)
    expected, found = gradient_norms(model, geometry, batch), gradient_norms(offloaded, geometry, batch)
    for index in expected:
        torch.testing.assert_close(torch.tensor(found[index]), torch.tensor(expected[index]))
