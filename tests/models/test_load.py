"""A model from the hub: what is fetched, what is refused, and what the user reads when there is nothing to fetch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import FakeHub, point_here, running_hub
from folders import save_folder, save_text
from tiny import tiny_model
from transformers import AutoModelForImageTextToText, LlavaConfig
from typer.testing import CliRunner, Result

from kvprof import Scores
from kvprof.calibration.mixture import TextRequest, mix_texts
from kvprof.calibration.sequences import batches
from kvprof.calibration.text import open_text
from kvprof.cli.app import app
from kvprof.errors import CalibrationError, ModelError, UsageError
from kvprof.models import conversion
from kvprof.models.checkpoint import hub as hub_client
from kvprof.models.config import load_config
from kvprof.models.identity import live_fingerprint
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.profile.gradients import gradient_norms
from kvprof.profile.norms import measure_norms

REMOTE = "org/tiny"


@pytest.fixture
def hub(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has one tiny Llama, and a client that asks it."""
    with running_hub() as hub:
        point_here(hub.url, in_tmp / "hub-cache", monkeypatch)
        hub.models[REMOTE] = save_folder(in_tmp / "served")
        yield hub


def kvprof(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def assert_fails(result: Result, *words: str, code: int = 1) -> None:
    """The command ended with one message that has these words, and no traceback."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    text = " ".join(result.output.split())
    for word in words:
        assert word in text
    assert "Traceback" not in text


def test_every_measuring_command_takes_a_hub_id(hub: FakeHub, in_tmp: Path) -> None:
    text = save_text(in_tmp / "text.txt")
    for command in (
        ["inspect", REMOTE],
        ["norms", REMOTE],
        ["gradients", REMOTE, "--data", str(text), "--sequences", "3", "--sequence-length", "12"],
    ):
        result = kvprof(*command)
        assert result.exit_code == 0, result.output
    remote = Scores.load(in_tmp / "outputs" / "org--tiny" / "norms.json")
    assert kvprof("norms", str(hub.models[REMOTE]), "--out", "local").exit_code == 0
    local = Scores.load("local/norms.json")
    assert remote.layers == local.layers
    assert remote.model.fingerprint == local.model.fingerprint
    assert remote.model.id == REMOTE


def test_a_new_process_finds_the_hub_by_its_environment(hub: FakeHub, in_tmp: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(in_tmp / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "kvprof", "norms"]
    result = subprocess.run([*command, REMOTE], env=environment, capture_output=True, text=True, cwd=in_tmp)
    assert result.returncode == 0, result.stderr
    assert (in_tmp / "outputs" / "org--tiny" / "norms.json").is_file()


def test_inspecting_fetches_no_weights(hub: FakeHub) -> None:
    assert kvprof("inspect", REMOTE).exit_code == 0
    assert "config.json" in hub.downloads()
    assert not any(name.endswith(".safetensors") for name in hub.downloads())


def test_only_what_is_read_is_fetched(hub: FakeHub, in_tmp: Path) -> None:
    (served := hub.models[REMOTE]).joinpath("original").mkdir()
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "modeling_own.py"):
        (served / extra).write_bytes(b"never read")
    assert kvprof("norms", REMOTE).exit_code == 0
    assert hub.downloads() >= {"config.json", "model.safetensors"}
    assert not {"pytorch_model.bin", "consolidated.safetensors", "modeling_own.py"} & hub.downloads()
    assert hub.sent_bytes["model.safetensors"] < (served / "model.safetensors").stat().st_size / 2
    load_model(resolve(REMOTE))
    assert hub.downloads() >= {"config.json", "model.safetensors"}
    assert not {"pytorch_model.bin", "consolidated.safetensors", "modeling_own.py"} & hub.downloads()


def test_a_sharded_model_has_the_norms_of_the_whole_one(hub: FakeHub, in_tmp: Path) -> None:
    hub.models["org/sharded"] = save_folder(in_tmp / "sharded", max_shard_size="10KB")
    assert len(list((in_tmp / "sharded").glob("*.safetensors"))) > 1
    assert kvprof("norms", "org/sharded").exit_code == 0
    assert kvprof("norms", REMOTE).exit_code == 0
    sharded, whole = (Scores.load(in_tmp / "outputs" / name / "norms.json") for name in ("org--sharded", "org--tiny"))
    assert sharded.layers == whole.layers
    assert sharded.model.fingerprint == whole.model.fingerprint


@pytest.mark.parametrize("command", ["norms", "gradients --sequence-length 32 --sequences 1"])
def test_a_model_of_pickles_is_refused_and_no_pickle_fetched(hub: FakeHub, command: str) -> None:
    served = hub.models[REMOTE]
    (served / "model.safetensors").rename(served / "pytorch_model.bin")
    assert_fails(kvprof(*command.split(), REMOTE), "only pickled weights (pytorch_model.bin)", "can run any code")
    assert "pytorch_model.bin" not in hub.downloads()
    assert kvprof("inspect", REMOTE).exit_code == 0  # which needs no weights


def test_a_repository_of_gguf_files_says_to_name_one(hub: FakeHub) -> None:
    served = hub.models[REMOTE]
    (served / "model.safetensors").rename(served / "tiny-q4_0.gguf")
    assert_fails(kvprof("norms", REMOTE), "tiny-q4_0.gguf")


def test_an_unknown_model_is_one_message(hub: FakeHub) -> None:
    assert_fails(kvprof("norms", "org/tyni"), "'org/tyni'", "none of this name", "Check the spelling")


def test_an_id_that_no_hub_can_have_is_one_message(hub: FakeHub) -> None:
    assert_fails(kvprof("norms", "org/a--b"), "org/a--b")
    assert_fails(kvprof("norms", "a model"), "'a model'", code=2)


def test_a_gated_model_says_how_to_get_access(hub: FakeHub) -> None:
    hub.gated.add(REMOTE)
    assert_fails(kvprof("norms", REMOTE), "gated", "log in")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_model_says_to_log_in(hub: FakeHub, status: int) -> None:
    hub.failing[REMOTE] = (status, "")
    assert_fails(kvprof("norms", REMOTE), "log in")


def test_a_hub_in_trouble_says_what_it_answered(hub: FakeHub) -> None:
    hub.failing[REMOTE] = (503, "")
    assert_fails(kvprof("norms", REMOTE), "503", "try again")


def test_a_hub_that_does_not_answer_is_not_waited_for(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "_HUB_SECONDS", 0.3)
    hub.silent.add(REMOTE)
    assert_fails(kvprof("norms", REMOTE), "timed out")


def test_a_hub_out_of_reach_is_one_message_and_a_model_in_the_cache_needs_none(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub() as hub:
        point_here(hub.url, in_tmp / "hub-cache", monkeypatch)
        hub.models[REMOTE] = save_folder(in_tmp / "served")
        assert kvprof("inspect", REMOTE).exit_code == 0
    assert kvprof("inspect", REMOTE).exit_code == 0
    assert_fails(kvprof("norms", REMOTE), "refused", "network")  # its weights were never fetched
    assert_fails(kvprof("inspect", "org/other"), "refused", "network")


def test_offline_is_named_as_the_reason(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_fails(kvprof("norms", REMOTE), "HF_HUB_OFFLINE is set")
    assert hub.log == []


def test_a_hub_dataset_is_calibration_text(hub: FakeHub, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False, raising=False)
    (served := in_tmp / "dataset").mkdir()
    (served / "train.jsonl").write_text('{"text": "one row"}\n{"text": "another row"}\n')
    hub.datasets["org/words"] = served
    assert sorted(open_text("org/words").rows) == ["another row", "one row"]
    with pytest.raises(CalibrationError, match="org/none"):
        list(open_text("org/none").rows)
    with pytest.raises(CalibrationError, match="org/words"):
        list(open_text("org/words", split="martian").rows)


def test_a_hub_dataset_is_read_by_the_configuration_that_is_named(
    hub: FakeHub, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False, raising=False)
    names = [f"words-{number}" for number in range(60)]  # a library's own message stops at some
    (served := in_tmp / "dataset").mkdir()
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in names)
    (served / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for name in names:
        (served / f"{name}.jsonl").write_text(json.dumps({"text": f"a row of {name}"}) + "\n")
    hub.datasets["org/words"] = served
    for asked in ("org/words", "org/words/wrods"):
        with pytest.raises(CalibrationError, match=rf": {', '.join(names)}\.\n.*--config words-0") as caught:
            list(open_text(asked).rows)
        assert asked in str(caught.value)
    assert list(open_text("org/words/words-7").rows) == ["a row of words-7"]
    assert sorted(open_text("hf://datasets/org/words/words-1*.jsonl").rows) == [
        f"a row of words-{number}" for number in sorted(map(str, (1, *range(10, 20))))
    ]
    ids = mix_texts(TextRequest(["org/words"], 1, 64, config="words-59"), _Characters()).complete()
    assert "".join(map(chr, ids.sequences[0])) == "a row of words-59"
    assert ids.info.dataset == "org/words/words-59"  # which reads the same again
    with pytest.raises(UsageError, match=r"--config words-1.*\n.*org/name/config"):
        mix_texts(TextRequest(["org/words/words-2"], 1, 64, config="words-1"), _Characters())


def test_a_hub_dataset_keeps_its_order_and_waits_for_nothing(
    hub: FakeHub, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False, raising=False)
    slept: list[float] = []
    monkeypatch.setattr("datasets.iterable_dataset.time.sleep", slept.append)
    (served := in_tmp / "dataset").mkdir()
    rows = [f"a row of number {number}" for number in range(300)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), served / "train.parquet", row_group_size=100)
    hub.datasets["org/rows"] = served
    stream = datasets.load_dataset("org/rows", split="train", streaming=True)
    expected = [row["text"] for row in stream.shuffle(seed=5, buffer_size=10_000)]
    slept.clear()
    assert list(open_text("org/rows", seed=5).rows) == expected
    assert slept == []


class _Characters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "/missing", "~/missing-model", "missing.gguf"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(name: str, in_tmp: Path) -> None:
    with pytest.raises(ModelError, match="no such folder or file"):
        resolve(name)


@pytest.mark.parametrize("name", ["", "a" * 5000 + "!", "a\0b", "org/na me", "~nobody-of-this-name", "ünï/cödé"])
def test_no_word_is_too_odd_for_a_message(name: str, in_tmp: Path) -> None:
    with pytest.raises((ModelError, UsageError)):
        resolve(name)


def test_a_folder_without_a_config_says_what_a_model_folder_holds(in_tmp: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json.*\n.*safetensors"):
        resolve(str(in_tmp))
    (in_tmp / "tiny.gguf").touch()
    (in_tmp / "mmproj-tiny.gguf").touch()
    assert resolve(str(in_tmp)).path == in_tmp / "tiny.gguf"
    (in_tmp / "tiny.Q4_0.gguf").touch()
    with pytest.raises(ModelError, match=r"Name one of the GGUF models in it: .*tiny\.Q4_0\.gguf, .*tiny\.gguf"):
        resolve(str(in_tmp))
    (in_tmp / "notes.txt").touch()
    with pytest.raises(ModelError, match="folder that holds its config"):
        resolve(str(in_tmp / "notes.txt"))


def test_a_folder_loads_frozen_in_eval_mode_in_the_dtype_asked_for(in_tmp: Path) -> None:
    source = resolve(str(save_folder(in_tmp / "model")))
    model = load_model(source, dtype="bfloat16", device="cpu")
    assert str(model.dtype) == "torch.bfloat16"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert str(load_model(source, device="cpu").dtype) == "torch.float32"
    assert load_tokenizer(source)("the cat")["input_ids"]
    assert load_config(source).num_hidden_layers == 2


def test_of_a_multimodal_model_the_text_decoder_is_measured_and_not_the_deeper_tower(in_tmp: Path) -> None:
    tower = {"num_hidden_layers": 5, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    config = LlavaConfig(
        text_config=tiny_model("llama").config.to_dict(),
        vision_config={"model_type": "clip_vision_model"} | sizes | tower,
    )
    live = AutoModelForImageTextToText.from_config(config)
    live.save_pretrained(in_tmp / "seeing")
    scores, inventory = measure_norms(resolve("seeing"))
    for measured, layer in zip(scores.layers, live.model.language_model.layers, strict=True):
        assert measured.key.frobenius_norm == pytest.approx(layer.self_attn.k_proj.weight.norm().item(), rel=1e-5)
    loaded = load_model(resolve("seeing"), device="cpu")
    assert live_fingerprint(loaded, inventory.geometry) == scores.model.fingerprint
    batch = next(batches([[5, 6, 7, 8]], 1))
    assert len(gradient_norms(loaded, inventory.geometry, batch)[0]) == 2


def test_a_misspelt_dtype_or_device_is_a_usage_error(in_tmp: Path) -> None:
    source = resolve(str(save_folder(in_tmp / "model")))
    with pytest.raises(UsageError, match="did you mean 'bfloat16'"):
        load_model(source, dtype="bflaot16")
    with pytest.raises(UsageError, match="cannot be used here"):
        load_model(source, device="martian:0")


def test_the_demo_comes_from_the_hub_where_its_package_is_absent(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "DEMO_PACKAGE", "no_such_package")
    monkeypatch.setattr(conversion, "DEMO_HUB_ID", REMOTE)
    assert resolve(None).hub_id == REMOTE
    assert kvprof("inspect").exit_code == 0
