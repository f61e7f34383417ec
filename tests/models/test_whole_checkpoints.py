"""A checkpoint is measured as it is, or refused: never with weights made up, left out, or taken for other numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import edit_weights, save_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.errors import ModelError
from kvprof.models.load import load_model, resolve

KEY = "model.layers.0.self_attn.k_proj.weight"
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def refusal(folder: Path, stream: bool = False) -> str:
    with pytest.raises(ModelError) as raised:
        load_model(resolve(str(folder)), device="cpu", stream=stream)
    return str(raised.value)


@STREAM
@pytest.mark.parametrize(
    "lost", [KEY, "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_a_weight_that_is_not_there_is_not_made_up(lost: str, stream: bool, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model")
    edit_weights(folder, lambda state: state.__delitem__(lost))
    assert f"lacks {lost}: transformers would make up random weights" in refusal(folder, stream)


def test_how_many_weights_are_lost_is_said(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model")
    edit_weights(folder, lambda state: [state.pop(name) for name in list(state) if ".layers.1." in name])
    assert "lacks model.layers.1.input_layernorm.weight and 8 more" in refusal(folder)


@STREAM
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_codes_are_not_taken_for_weights(dtype: torch.dtype, stream: bool, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model")

    def edit(state: dict[str, Tensor]) -> None:
        state[KEY] = (state[KEY] * 100).to(dtype)

    edit_weights(folder, edit)
    name = str(dtype).removeprefix("torch.")
    assert f"{KEY} is quantized to {name}" in refusal(folder, stream)


def shards(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Tensor]], None], indexed: bool = True) -> None:
    """Split a model's file into two shards, change these, and write an index of what they held before."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [{name: state[name] for name in list(state)[start::2]} for start in (0, 1)]
    index = {name: f"model-{number}.safetensors" for number, part in enumerate(parts) for name in part}
    if indexed:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    change(*parts)
    for number, part in enumerate(parts):
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})


def twice(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    name = next(iter(one))
    other[name] = -3 * one[name]


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    name = next(iter(one))
    other[name] = one.pop(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (twice, "stands twice, in model-0.safetensors and in model-1.safetensors"),
        (moved, "is in model-0.safetensors, but it is not"),
        (lambda one, other: one.pop(next(iter(one))), "is in model-0.safetensors, but it is not"),
    ],
)
def test_shards_that_are_not_what_the_index_says_are_refused_by_every_command(
    change: Callable[[dict[str, Tensor], dict[str, Tensor]], None], says: str, in_tmp: Path
) -> None:
    shards(save_folder(in_tmp / "model"), change)
    for command in ("norms", "gradients", "spectra"):
        result = run(command, "model", *(["--stream"] if command == "spectra" else []))
        assert result.exit_code == 1
        assert says in " ".join(result.output.split())


def test_shards_without_an_index_have_norms_and_are_not_loaded(in_tmp: Path) -> None:
    shards(save_folder(in_tmp / "model"), lambda one, other: None, indexed=False)
    assert run("norms", "model").exit_code == 0
    result = run("gradients", "model")
    assert result.exit_code == 1
    assert "neither model.safetensors nor model.safetensors.index.json" in " ".join(result.output.split())
    assert "Download the index too" in result.output
