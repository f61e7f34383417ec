"""The dtype of a model whose config names none: what transformers loads it in, seen before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import edit_json, edit_weights, save_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kvprof.cli.app import app
from kvprof.models.config import dtype_of, load_config, weight_bytes
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, resolve
from kvprof.records.scores import Scores


def without_dtype(folder: Path, dtype: torch.dtype = torch.bfloat16, **arguments: object) -> Path:
    """Save a tiny model in a dtype that its config.json does not tell."""
    save_folder(folder, **arguments)
    for file in folder.glob("*.safetensors"):
        state = {name: weight.to(dtype) for name, weight in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype=None, torch_dtype=None)
    return folder


def transformers_dtype(folder: Path) -> torch.dtype:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype


@pytest.mark.parametrize("arguments", [{}, {"max_shard_size": "10KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_the_one_that_transformers_loads(
    tmp_path: Path, dtype: torch.dtype, arguments: dict[str, object]
) -> None:
    source = resolve(str(without_dtype(tmp_path, dtype, **arguments)))
    config = load_config(source)
    assert transformers_dtype(tmp_path) == dtype == dtype_of(config, "auto") == load_model(source).dtype
    assert take_inventory(config).geometry.dtype == str(dtype).removeprefix("torch.")
    assert weight_bytes(config) == sum(weight.nbytes for weight in load_model(source).parameters())


@pytest.mark.parametrize("first", ["a.scale", "zz.scale"])
def test_of_mixed_dtypes_the_first_by_name_counts_as_it_does_for_transformers(tmp_path: Path, first: str) -> None:
    folder = without_dtype(tmp_path)
    edit_weights(folder, lambda state: state.update({first: torch.ones(3), "a.codes": torch.ones(3).to(torch.int8)}))
    edit_weights(folder, lambda state: state.update({"a.f8": torch.ones(3).to(torch.float8_e4m3fn)}))
    expected = transformers_dtype(folder)
    assert expected == (torch.float32 if first.startswith("a") else torch.bfloat16)
    assert dtype_of(load_config(resolve(str(folder))), "auto") == expected


def test_a_config_that_names_a_dtype_is_taken_at_its_word(tmp_path: Path) -> None:
    folder = without_dtype(tmp_path)
    edit_json(folder / "config.json", dtype="float16")
    assert transformers_dtype(folder) == dtype_of(load_config(resolve(str(folder))), "auto") == torch.float16


def test_without_config_and_weights_to_ask_16_bits_are_assumed_and_said(tmp_path: Path) -> None:
    folder = without_dtype(tmp_path)
    (folder / "model.safetensors").unlink()
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 0, result.output
    assert "each token adds 128 bytes" in result.output  # 2 layers, K and V, 2 heads of 8, 2 bytes
    assert "the config names no dtype" in result.output
    assert "bfloat16 is assumed" in result.output
    answer = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)
    assert answer["dtype_assumed"]


def test_a_dtype_that_weights_tell_is_not_called_assumed(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(without_dtype(tmp_path))])
    assert "assumed" not in result.output
    assert "each token adds 128 bytes" in result.output


def test_gradients_name_one_dtype_wherever_they_name_one(in_tmp: Path) -> None:
    without_dtype(in_tmp / "model")
    words = ["--sequences", "1", "--sequence-length", "32", "--formats", "none", "--data", "builtin", "--out", "out"]
    result = CliRunner().invoke(app, ["gradients", "model", *words])
    assert result.exit_code == 0, result.output
    scores = Scores.load("out/gradients.json")
    assert scores.geometry is not None
    assert scores.made_with is not None
    assert scores.geometry.dtype == scores.made_with.dtype == "bfloat16"
