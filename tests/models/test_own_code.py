"""Nothing runs from a checkpoint, and no pickle is opened: every way in that a stranger's folder could try.

A file that runs leaves another, `sprung`, in the working folder; a pickle that is opened raises on the spot.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import edit_json, save_folder, save_text
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import kvprof
from kvprof.cli.app import COMMANDS, app, make_app
from kvprof.errors import ModelError
from kvprof.models.config import load_config
from kvprof.models.load import load_model, load_tokenizer, resolve

TRAP = "from pathlib import Path\nPath('sprung').touch()\n"
CONFIG = "from transformers import LlamaConfig\n\nfrom .traps import nothing\n\nclass OwnConfig(LlamaConfig):\n"
MODEL = "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n"
CODE = {
    "configuration_own.py": TRAP + CONFIG + "    model_type = 'own'\n",
    "modeling_own.py": TRAP + MODEL + "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
    "traps.py": TRAP + "nothing = 0\n",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
TOKENIZER_TRAP = (
    "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
)

LOADING = ("inspect", "norms", "spectra", "gradients", "divergence", "calibrate", "evaluate", "benchmark", "generate",
           "validate", "verify", "import", "run")  # fmt: skip
"""The commands that load a model, or its config."""


class Sprung:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


@pytest.fixture
def folder(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny Llama in the folder `model`. Opening a pickle raises; a model's modules go to a folder of their own."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", opened)
    monkeypatch.setattr(pickle, "load", opened)
    monkeypatch.setattr(pickle, "loads", opened)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(in_tmp / "modules"))
    monkeypatch.syspath_prepend(str(in_tmp / "modules"))
    monkeypatch.setattr("kvprof.models.own_code._named", set())
    yield save_folder(in_tmp / "model")
    assert not Path("modules").exists() or Path("trusted").exists(), "code was copied to where it runs"
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def bring_code(folder: Path, **config: object) -> None:
    """Put code into a folder, and make it needed."""
    for name, code in CODE.items():
        (folder / name).write_text(code)
    edit_json(
        folder / "config.json", **{"model_type": "own", "architectures": ["OwnModel"], "auto_map": AUTO_MAP, **config}
    )


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def said(result: Result, code: int = 1) -> str:
    assert isinstance(result.exception, SystemExit) or code == 0, result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


# Code


@pytest.mark.parametrize("command", ["inspect", "norms", "gradients"])
def test_a_model_that_needs_its_own_code_is_refused_with_the_code_and_the_flag_named(
    folder: Path, command: str
) -> None:
    bring_code(folder)
    text = said(run(command, "model"))
    assert "configuration_own.py, modeling_own.py, traps.py" in text
    assert "configuration_own.OwnConfig" in text
    assert "--trust-remote-code" in text
    assert not Path("sprung").exists()


def test_with_the_flag_the_files_are_named_and_the_numbers_are_those_of_the_same_model_without_code(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = kvprof.norms("model")
    window = {"sink_tokens": 0, "recent_tokens": 4, "formats": "int4g16", "sequences": 2, "sequence_length": 24}
    save_text(Path("text.txt"))
    plain_gradients = kvprof.gradients("model", data="text.txt", pack=True, **window)
    bring_code(folder)
    Path("trusted").touch()
    text = said(run("norms", "model", "--trust-remote-code", "--out", "out"), 0)
    assert "configuration_own.py, modeling_own.py, traps.py" in text
    assert Path("sprung").exists()
    own = kvprof.Scores.load("out/norms.json")
    assert own.layers == plain.layers
    assert own.model is not None
    assert plain.model is not None
    assert (own.model.architecture, own.model.fingerprint) == ("OwnModel", plain.model.fingerprint)
    gradients = kvprof.gradients("model", data="text.txt", pack=True, trust_remote_code=True, **window)
    assert gradients.layers == plain_gradients.layers
    with pytest.raises(ModelError, match="not run unless you say so"):  # trust is for that once
        kvprof.norms("model")


def test_the_files_are_named_before_they_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_code(folder)
    Path("trusted").touch()
    named: list[bool] = []
    monkeypatch.setattr("kvprof.models.own_code.logger.warning", lambda *_: named.append(Path("sprung").exists()))
    load_config(resolve("./model", trust_remote_code=True))
    load_config(resolve("./model", trust_remote_code=True))
    assert named == [False]  # before, and once
    assert Path("sprung").exists()


def test_code_beside_a_model_that_does_without_it_never_runs_even_with_the_flag(folder: Path) -> None:
    bring_code(folder, model_type="llama")
    for flag in ((), ("--trust-remote-code",)):
        said(run("norms", "model", "--out", "out", *flag), 0)
    load_model(resolve("./model", trust_remote_code=True))
    assert not Path("sprung").exists()


def test_a_tokenizer_s_code_needs_the_flag_too(folder: Path) -> None:
    (folder / "tokenization_own.py").write_text(TRAP + TOKENIZER_TRAP)
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", "tokenization_own.OwnTokenizer"]}
    edit_json(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")
    with pytest.raises(ModelError, match=r"tokenization_own\.py(.|\n)*--trust-remote-code"):
        load_tokenizer(resolve("./model"))
    assert not Path("sprung").exists()
    Path("trusted").touch()
    assert load_tokenizer(resolve("./model", trust_remote_code=True))("the cat")["input_ids"]
    assert Path("sprung").exists()


def test_code_for_a_tokenizer_that_makes_none_is_one_message(folder: Path) -> None:
    (folder / "tokenization_own.py").write_text(
        TRAP + "from transformers import PretrainedConfig\n\n\nclass OwnTokenizer(PretrainedConfig):\n    pass\n"
    )
    Path("trusted").touch()
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    edit_json(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")
    with pytest.raises(ModelError, match=r"cannot load the tokenizer|is a OwnTokenizer, which is none"):
        load_tokenizer(resolve("./model", trust_remote_code=True))


def test_code_beside_a_gguf_file_is_never_asked_for_nor_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_gguf import write_gguf
    from tiny import tiny_model

    bring_code(folder)
    (folder / "tokenization_own.py").write_text(TRAP + TOKENIZER_TRAP)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    write_gguf(folder / "tiny.gguf", tiny_model("llama"))

    def asked(prompt: str = "") -> str:
        Path("asked").touch()
        return "y"

    monkeypatch.setattr("builtins.input", asked)
    source = resolve("model/tiny.gguf", trust_remote_code=True)
    load_config(source)
    load_model(source)
    with contextlib.suppress(ModelError):
        load_tokenizer(source)
    assert not Path("asked").exists()
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("org/elsewhere--modeling_own.OwnModel", "takes its code from another repository, org/elsewhere"),
        ("../modeling_own.OwnModel", "names no class of a file there"),
        ("/tmp/modeling_own.OwnModel", "names no class of a file there"),
        ("a.b.OwnModel", "names no class of a file there"),
        (7, "names no class of a file there"),
        ({"a": "b.C"}, "names no class of a file there"),
    ],
    ids=str,
)
def test_code_from_anywhere_but_the_folder_is_refused_even_with_the_flag(
    folder: Path, reference: object, words: str
) -> None:
    bring_code(folder, auto_map={**AUTO_MAP, "AutoModelForCausalLM": reference})
    assert words in said(run("norms", "model", "--trust-remote-code"))
    assert not Path("sprung").exists()


def test_code_that_is_missing_is_named(folder: Path) -> None:
    bring_code(folder)
    (folder / "modeling_own.py").unlink()
    assert "code that is not there: modeling_own.py" in said(run("norms", "model", "--trust-remote-code"))


def test_every_command_that_loads_a_model_has_the_flag_and_it_is_off(in_tmp: Path) -> None:
    for name in COMMANDS:
        (made,) = make_app([name]).registered_commands
        parameter = inspect.signature(made.callback).parameters.get("trust_remote_code")
        assert (parameter is not None) == (name in LOADING), name
        assert parameter is None or parameter.default is False


def test_a_recipe_cannot_grant_trust_and_its_reader_can(folder: Path) -> None:
    bring_code(folder)
    Path("own.toml").write_text('model = "./model"\nout = "out"\ntrust_remote_code = true\n[norms]\n')
    assert "unknown key trust_remote_code" in said(run("run", "own.toml"))
    Path("own.toml").write_text('model = "./model"\nout = "out"\n[norms]\n')
    text = run("run", "own.toml")
    assert text.exit_code == 1
    assert not Path("sprung").exists()
    Path("trusted").touch()
    assert "--trust-remote-code" in said(run("run", "own.toml", "--trust-remote-code"), 0)
    assert Path("out/norms.json").is_file()


def test_a_config_cannot_have_attention_fetched_from_the_hub(folder: Path) -> None:
    for name in ("attn_implementation", "_attn_implementation"):
        edit_json(folder / "config.json", **{name: "evil/kernel"})
        assert "evil/kernel" in said(run("norms", "model"))
        edit_json(folder / "config.json", **{name: None})


# Pickles


def as_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Sprung()))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    as_pickle(folder / "pytorch_model.bin")


def beside_a_stray(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "stray.safetensors")
    as_pickle(folder / "pytorch_model.bin")


def sharded(folder: Path, shard: str) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_names_a_pickle(folder: Path) -> None:
    sharded(folder, "pytorch_model.bin")
    as_pickle(folder / "pytorch_model.bin")


def index_leads_out(folder: Path) -> None:
    sharded(folder, "../outside.safetensors")
    save_file(load_file(folder / "a.safetensors"), "outside.safetensors", metadata={"format": "pt"})


def index_is_absolute(folder: Path) -> None:
    sharded(folder, str(folder / "a.safetensors"))


def a_pickle_under_another_name(folder: Path) -> None:
    as_pickle(folder / "model.safetensors")


def a_link_to_a_pickle(folder: Path) -> None:
    as_pickle(Path("outside.bin"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(Path("outside.bin").resolve())


def a_link_to_a_device(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


def a_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def weights_of_another_name(folder: Path) -> None:
    edit_json(folder / "config.json", transformers_weights="pytorch_model.bin")
    as_pickle(folder / "pytorch_model.bin")


def an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/elsewhere", "peft_type": "LORA"}')
    as_pickle(folder / "adapter_model.bin")


WAYS: dict[Callable[[Path], None], str] = {
    only_a_pickle: r"only pickled weights(.|\n)*save_pretrained",
    beside_a_stray: r"model\.safetensors|layer",
    index_names_a_pickle: r"'pytorch_model.bin', which is no safetensors file(.|\n)*save_pretrained",
    index_leads_out: "outside its folder",
    index_is_absolute: "outside its folder",
    a_pickle_under_another_name: "truncated or corrupt",
    a_link_to_a_pickle: "truncated or corrupt",
    a_link_to_a_device: "holds no weights",
    a_pipe: "holds no weights",
    weights_of_another_name: "transformers_weights",
    an_adapter: "adapter",
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_way_to_a_pickle_or_out_of_the_folder(folder: Path, way: Callable[[Path], None]) -> None:
    way(folder)
    with pytest.raises(ModelError, match=WAYS[way]):
        load_model(resolve("./model"))
    if way is not beside_a_stray:  # its weights are read for norms, wherever they are called
        with pytest.raises(ModelError, match=WAYS[way]):
            kvprof.norms("./model")
    assert not Path("sprung").exists()


def test_pickles_beside_a_sound_checkpoint_are_left_alone(folder: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "vocab.pkl", "vocab.bin"):
        as_pickle(folder / name)
    load_model(resolve("./model"))
    load_tokenizer(resolve("./model"))
    kvprof.norms("./model")
    assert not Path("sprung").exists()


# Sizes


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_experts", "num_local_experts", "n_layer"])
def test_a_config_cannot_ask_for_a_billion_layers(folder: Path, name: str) -> None:
    for model_type in ("llama", "qwen2", "qwen3_moe", "gpt2"):
        edit_json(folder / "config.json", model_type=model_type, **{name: 10**9})
        with pytest.raises(ModelError, match=f"{name} is 1000000000"):
            load_config(resolve("./model"))


def test_a_config_of_many_megabytes_is_not_read(folder: Path) -> None:
    with open(folder / "config.json", "a") as file:
        file.write(" " * 2**24)
    with pytest.raises(ModelError, match="no config has more than"):
        load_config(resolve("./model"))


def test_a_folder_is_one_whatever_it_is_called(folder: Path) -> None:
    shutil.move(folder, "-rf $(touch sprung)")
    said(run("norms", "./-rf $(touch sprung)", "--out", "out"), 0)
    assert not Path("sprung").exists()
