"""Whatever is wrong with a model folder: one message, exit code 1, nothing of the model's own run, no result left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import save_folder
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from typer.testing import CliRunner

from kvprof.cli.app import app

KEY = "model.layers.1.self_attn.k_proj.weight"
VALUE = "model.layers.0.self_attn.v_proj.weight"
TRAP = "from pathlib import Path\nPath('sprung').touch()\n"


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """A tiny Llama in the folder `model`."""
    tiny_model("llama").save_pretrained(in_tmp / "model")
    return in_tmp / "model"


def refusal(command: str = "norms") -> str:
    """Run a command on the folder, hold it to its exit code and silence, and return its message on one line."""
    result = CliRunner().invoke(app, [command, "model", *(["--out", "result"] if command != "inspect" else [])])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) <= 8
    assert not list(Path("result").glob("*.json"))
    assert not Path("sprung").exists()
    return " ".join(result.output.split())


def config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(content, encoding="utf-8") and None


def tensor(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file(state | {name: edit(state[name])}, folder / "model.safetensors")

    return damage


BROKEN_CONFIGS = {
    "no JSON": (text("{"), "not a valid JSON"),
    "empty": (text(""), "not a valid JSON"),
    "a list": (text("[1]"), "holds [1], and no config"),
    "a number": (text("3"), "holds 3, and no config"),
    "a word": (text('"llama"'), 'holds "llama", and no config'),
    "null": (text("null"), "holds null, and no config"),
    "too deep": (text("[" * 100_000), "cannot load the config"),
    "unknown model_type": (config(model_type="martian"), "martian"),
    "model_type of a wrong type": (config(model_type=["llama"]), "cannot load the config"),
    "words for numbers": (config(num_hidden_layers="two"), "num_hidden_layers"),
    "no hidden size": (config(hidden_size=None), "hidden_size"),
    "no layers": (config(num_hidden_layers=0), "without layers"),
    "negative layers": (config(num_hidden_layers=-1), "LlamaConfig"),
    "no heads": (config(num_attention_heads=0), "cannot load the config"),
    "no KV heads": (config(num_key_value_heads=0), "LlamaConfig"),
    "architectures of a wrong type": (config(architectures=5), "architectures is 5, no list of names"),
    "a window of less than nothing": (config(sliding_window=-5), "cannot be: window is -5"),
    "a head beyond all memory": (config(head_dim=10**9), "layer 0 would cache 2000000000 numbers a token"),
    "heads that do not divide": (config(num_attention_heads=3, head_dim=None), "multiple"),
    "unknown activation": (config(hidden_act="martian"), "martian"),
    "unknown rope": (config(rope_parameters={"rope_type": "martian"}), "martian"),
    "unknown dtype": (config(dtype="martian"), "martian"),
    "an encoder": (text('{"model_type": "bert"}'), "an encoder"),
    "an encoder-decoder": (text('{"model_type": "bart"}'), "decoder-only"),
    "T5": (text('{"model_type": "t5"}'), "decoder-only"),
    "a vision model": (text('{"model_type": "vit"}'), "no decoder language model"),
}


@pytest.mark.parametrize("name", sorted(BROKEN_CONFIGS))
@pytest.mark.parametrize("command", ["inspect", "norms"])
def test_a_broken_config_is_one_message(folder: Path, command: str, name: str) -> None:
    damage, words = BROKEN_CONFIGS[name]
    damage(folder)
    assert words in refusal(command)


BROKEN_WEIGHTS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "can run any code",
    ),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "truncated or corrupt"),
    "a cut file": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "truncated or corrupt",
    ),
    "NaN": (tensor(KEY, lambda weight: weight.fill_(float("nan"))), f"{KEY} holds 512 NaN"),
    "infinity": (tensor(VALUE, lambda weight: weight.fill_(float("inf"))), f"{VALUE} holds 512 NaN or infinite"),
    "another shape": (tensor(KEY, lambda weight: weight[:8].clone()), f"{KEY} is 8x32, but the config says 16 rows"),
    "int8": (tensor(KEY, lambda weight: weight.to(torch.int8)), f"{KEY} is quantized to int8"),
    "float8": (tensor(KEY, lambda weight: weight.to(torch.float8_e4m3fn)), "quantized to float8_e4m3fn"),
    "more layers in the config": (config(num_hidden_layers=3), "layer 2 does not"),
}


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3", {"head_dim": 10**9}, "layer 0 would cache 2000000000 numbers a token"),  # whose norm would be made
        ("gpt-bigcode-mha", {"num_key_value_heads": float("inf")}, "num_key_value_heads is inf, no number of heads"),
        ("gpt-bigcode-mha", {"num_key_value_heads": "\x1b[31m"}, r"num_key_value_heads is '\x1b[31m', no number"),
        ("mpt", {"n_heads": 10**9}, "describes a cache that cannot be: geometry layer 0 caches nothing"),
        ("dbrx", {"num_key_value_heads": -5}, "describes a cache that cannot be: kv_heads is -5"),
    ],
)
def test_a_config_of_another_family_that_cannot_be_is_one_message(
    family: str, change: dict[str, object], words: str, in_tmp: Path
) -> None:
    save_folder(in_tmp / "model", family)
    config(**change)(in_tmp / "model")
    for command in ("inspect", "norms"):
        assert words in refusal(command)


@pytest.mark.parametrize("name", sorted(BROKEN_WEIGHTS))
def test_a_broken_checkpoint_is_one_message(folder: Path, name: str) -> None:
    damage, words = BROKEN_WEIGHTS[name]
    damage(folder)
    assert words in refusal()


def test_a_checkpoint_that_breaks_midway_leaves_no_result(folder: Path) -> None:
    tensor(KEY, lambda weight: weight.fill_(float("nan")))(folder)  # the last layer: the first one was measured
    refusal()
    assert list(Path("result").iterdir()) == []


def test_code_that_a_model_brings_is_never_run(folder: Path) -> None:
    for module in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{module}.py").write_text(TRAP)
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config(model_type="own", auto_map=own)(folder)
    for command in ("inspect", "norms"):
        assert "which is not run unless you say so: configuration_own.py, modeling_own.py" in refusal(command)
    config(model_type="llama", auto_map=own)(folder)  # transformers knows this one without it
    assert CliRunner().invoke(app, ["norms", "model", "--out", "result"]).exit_code == 0
    assert not Path("sprung").exists()


def test_a_folder_without_a_config_is_one_message(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal()


def test_a_folder_without_a_tokenizer_is_one_message(folder: Path) -> None:
    result = CliRunner().invoke(app, ["gradients", "model", "--sequence-length", "32", "--out", "result"])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert "tokenizer" in result.output
    assert not list(Path("result").glob("gradients*"))
