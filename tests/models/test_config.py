"""Configs that no library reads in words of use: what is wrong with each is said, and what to write instead."""

import json
from pathlib import Path

import pytest
from folders import save_folder
from typer.testing import CliRunner

from kvprof.cli.app import app

GEMMA = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 96,
}


def refused(place: Path, config: object) -> str:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    for command in ("inspect", "norms"):
        result = CliRunner().invoke(app, [command, str(place)])
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "flaot16", "nn", "auto", "torch.bfloat16", 16], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_a_dtype_that_no_model_is_loaded_in(in_tmp: Path, name: str, dtype: object, inside: bool) -> None:
    config = json.loads((save_folder(in_tmp / "model") / "config.json").read_text())
    config.pop("dtype", None)
    changed = config | ({"text_config": {name: dtype}} if inside else {name: dtype})
    said = refused(in_tmp / "model", changed)
    assert f"{name} is {dtype!r}, which is no dtype that transformers loads a model in. Write bfloat16" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "half", "float64"])
def test_a_dtype_as_people_write_it(in_tmp: Path, dtype: str) -> None:
    folder = save_folder(in_tmp / "model")
    config = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 0, result.output


def test_sliding_layers_without_a_window(in_tmp: Path) -> None:
    said = refused(in_tmp / "model", GEMMA | {"sliding_window": None})
    assert "has sliding layers and no sliding_window: nobody knows how many tokens they see. Write the number" in said


@pytest.mark.parametrize("heads", [3, 5, 8])
def test_query_heads_that_the_kv_heads_cannot_share(in_tmp: Path, heads: int) -> None:
    config = json.loads((save_folder(in_tmp / "model") / "config.json").read_text())
    said = refused(in_tmp / "model", config | {"num_key_value_heads": heads})
    assert f"{config['num_attention_heads']} query heads, which {heads} KV heads cannot share evenly" in said


LLAMA = {"model_type": "llama", "vocab_size": 96}
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LLAMA, "num_hidden_layers 32, num_attention_heads 32, hidden_size 4096"),
        (LLAMA | SIZES, None),
        (LLAMA | SIZES | {"num_hidden_layers": 32}, None),
        ({"model_type": "llava"}, "num_hidden_layers 32, num_attention_heads 32, hidden_size 4096"),
        ({"model_type": "llava", "text_config": LLAMA | {"num_hidden_layers": 3}}, "num_attention_heads 32, hidden"),
        ({"model_type": "llava", "text_config": LLAMA | SIZES}, None),
        ({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}, None),
        ({"model_type": "gpt2", "n_layer": 12, "n_embd": 768}, "num_attention_heads 12"),
    ],
    ids=str,
)
def test_sizes_that_transformers_makes_up_are_named(in_tmp: Path, config: dict[str, object], told: str | None) -> None:
    (in_tmp / "model").mkdir()
    (in_tmp / "model" / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["inspect", "model"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert ("transformers' defaults are taken" in said) == (told is not None)
    if told is not None:
        assert f"the config does not name these, and transformers' defaults are taken: {told}" in said
