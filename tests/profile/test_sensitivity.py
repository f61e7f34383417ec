"""Does a stopped run go on where it was, to the same file byte for byte, and refuse to go on with other settings?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvprof.errors import Mismatch, UsageError
from kvprof.models.load import ModelSource, resolve
from kvprof.profile import sensitivity
from kvprof.profile.decoder import Decoder
from kvprof.profile.sensitivity import SensitivitySettings, run_sensitivity
from kvprof.records.plan import Window
from kvprof.records.scores import Scores

DECODER = Decoder({"key": ("int2g4", "rot2"), "value": ("int3g8",)}, Window(sink_tokens=1, recent_tokens=4), 0.5)
SETTINGS = SensitivitySettings(
    data=("builtin",), sequences=6, sequence_length=24, dtype="float32", device="cpu", decoder=DECODER
)


def save_tiny(folder: Path, seed: int = 0) -> ModelSource:
    """Save a tiny Llama with a tokenizer of single characters."""
    model = tiny_model("llama")
    if seed:
        torch.manual_seed(seed)
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.normal_()
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0} | {chr(code): code - 31 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return resolve(str(folder))


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sequences of each forward and backward that runs."""
    seen: list[tuple[int, ...]] = []
    measure = sensitivity.gradient_norms

    def spy(model: object, geometry: object, batch: sensitivity.Batch) -> object:
        seen.append(batch.indices)
        return measure(model, geometry, batch)

    monkeypatch.setattr(sensitivity, "gradient_norms", spy)
    return seen


def stop_after(sequences: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= sequences:
            raise KeyboardInterrupt

    return progress


def stopped(source: ModelSource, settings: SensitivitySettings, folder: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_sensitivity(source, settings, folder, progress=stop_after(after))
    assert not (folder / "gradients.json").exists()


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("after", [0, 2, 4, 6])
def test_a_stopped_run_goes_on_to_the_same_file_and_measures_only_the_rest(
    source: ModelSource, tmp_path: Path, forwards: list[tuple[int, ...]], after: int, batch_size: int
) -> None:
    settings = replace(SETTINGS, batch_size=batch_size)
    whole = run_sensitivity(source, settings, tmp_path / "whole")
    assert sorted(index for batch in forwards for index in batch) == list(range(6))
    stopped(source, settings, tmp_path / "resumed", after)
    forwards.clear()
    seen: list[tuple[int, int]] = []
    resumed = run_sensitivity(source, settings, tmp_path / "resumed", progress=lambda *at: seen.append(at))
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert sum(map(len, forwards)) == 6 - after
    assert seen == [(done, 6) for done in range(after, 7, batch_size)]
    assert any(f"{after} of 6" in remark for remark in resumed.remarks) == (after > 0)


def test_a_finished_run_leaves_only_its_result_and_begins_anew(
    source: ModelSource, tmp_path: Path, forwards: list[tuple[int, ...]]
) -> None:
    folder = tmp_path / "out"
    first = run_sensitivity(source, SETTINGS, folder).path.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["gradients.json"]
    forwards.clear()
    assert run_sensitivity(source, SETTINGS, folder).path.read_bytes() == first
    assert len(forwards) == 6


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("sequences", 7, "sequences"),
        ("sequence_length", 20, "sequence_length"),
        ("seed", 1, "seed"),
        ("split", "held-out", "split"),
        ("dtype", "bfloat16", "dtype"),
    ],
)
def test_a_stopped_run_refuses_another_setting_by_name(
    source: ModelSource, tmp_path: Path, field: str, value: object, named: str
) -> None:
    stopped(source, SETTINGS, tmp_path / "out", 2)
    with pytest.raises(Mismatch, match=f"another {named}:") as raised:
        run_sensitivity(source, replace(SETTINGS, **{field: value}), tmp_path / "out")
    assert raised.value.exit_code == 4
    assert "--restart" in str(raised.value)


def test_a_stopped_run_refuses_other_weights_under_the_same_name(source: ModelSource, tmp_path: Path) -> None:
    stopped(source, SETTINGS, tmp_path / "out", 2)
    other = save_tiny(tmp_path / "model", seed=5)
    assert other == source
    with pytest.raises(Mismatch, match="another model fingerprint:"):
        run_sensitivity(other, SETTINGS, tmp_path / "out")


def test_restart_begins_anew_with_other_settings(
    source: ModelSource, tmp_path: Path, forwards: list[tuple[int, ...]]
) -> None:
    stopped(source, SETTINGS, tmp_path / "out", 2)
    forwards.clear()
    again = replace(SETTINGS, sequences=3)
    restarted = run_sensitivity(source, again, tmp_path / "out", restart=True)
    assert len(forwards) == 3
    assert restarted.path.read_bytes() == run_sensitivity(source, again, tmp_path / "fresh").path.read_bytes()


def test_another_batch_size_may_resume(source: ModelSource, tmp_path: Path, forwards: list[tuple[int, ...]]) -> None:
    whole = run_sensitivity(source, SETTINGS, tmp_path / "whole").scores
    stopped(source, SETTINGS, tmp_path / "out", 2)
    forwards.clear()
    resumed = run_sensitivity(source, replace(SETTINGS, batch_size=4), tmp_path / "out").scores
    assert [len(batch) for batch in forwards] == [4]
    for found, expected in zip(resumed.layers, whole.layers, strict=True):
        assert found.key.gradient_norm == pytest.approx(expected.key.gradient_norm, rel=1e-5)
        assert found.value.gradient_norm == pytest.approx(expected.value.gradient_norm, rel=1e-5)


def test_the_file_says_what_was_measured_on_what(source: ModelSource, tmp_path: Path) -> None:
    run = run_sensitivity(source, SETTINGS, tmp_path / "out")
    scores = Scores.load(run.path)
    assert scores == run.scores
    assert (scores.source, scores.metrics) == ("gradients", ("loss_increase", "gradient_norm"))
    assert scores.calibration.dataset == "builtin"
    assert (scores.calibration.sequences, scores.calibration.sequence_length) == (6, 24)
    assert scores.model.id == source.id
    assert scores.model.fingerprint.startswith("sha256:")


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("sequences", 0), ("sequence_length", 65)])
def test_settings_that_cannot_be_are_refused_before_the_model_loads(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: int
) -> None:
    monkeypatch.setattr(sensitivity, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=f"--{field.replace('_', '-')} {value}"):
        run_sensitivity(source, replace(SETTINGS, **{field: value}), tmp_path / "out")
