"""Does a stopped run go on where it was, to the same file byte for byte, and refuse to go on with other settings?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import save_folder, save_text
from requested import changed
from tiny import tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvprof.errors import InvalidFile, KvprofError, Mismatch, UsageError
from kvprof.models.load import resolve
from kvprof.models.source import ModelSource
from kvprof.profile import scoring, sensitivity
from kvprof.profile.decoder import Decoder
from kvprof.profile.sensitivity import SensitivityRun
from kvprof.profile.sensitivity import run_sensitivity as run_with
from kvprof.records.effects import encode
from kvprof.records.plan import Window
from kvprof.records.requests.measure import GradientsRequest
from kvprof.records.scores import KlCalibration, Scores
from kvprof.storage import journal as journals

DECODER = Decoder({"key": ("int2g4", "rot2"), "value": ("int3g8",)}, Window(sink_tokens=1, recent_tokens=4), 0.5)
SETTINGS = GradientsRequest(data=("builtin",), sequences=6, sequence_length=24, dtype="float32", device="cpu")


def run_sensitivity(*args: object, decoder: Decoder = DECODER, **how: object) -> SensitivityRun:
    return run_with(*args, decoder=decoder, **how)


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
    measure = scoring.gradient_norms

    def spy(model: object, geometry: object, batch: scoring.Batch) -> object:
        seen.append(batch.indices)
        return measure(model, geometry, batch)

    monkeypatch.setattr(scoring, "gradient_norms", spy)
    return seen


def stop_after(sequences: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= sequences:
            raise KeyboardInterrupt

    return progress


def stopped(source: ModelSource, request: GradientsRequest, folder: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_sensitivity(source, request, folder, progress=stop_after(after))
    assert not (folder / "gradients.json").exists()


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("after", [0, 2, 4, 6])
def test_a_stopped_run_goes_on_to_the_same_file_and_measures_only_the_rest(
    source: ModelSource, tmp_path: Path, forwards: list[tuple[int, ...]], after: int, batch_size: int
) -> None:
    settings = changed(SETTINGS, batch_size=batch_size)
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


def test_the_same_scores_measured_again_keep_the_factor_that_they_were_calibrated_by(
    source: ModelSource, tmp_path: Path
) -> None:
    scores = run_sensitivity(source, SETTINGS, tmp_path).scores
    factor = KlCalibration(factor=1.5, plans=3, sequences=4, spread=1.1)
    scores.model_copy(update={"kl_calibration": factor}).save(tmp_path / "gradients.json")
    again = run_sensitivity(source, SETTINGS, tmp_path)
    assert again.scores.kl_calibration == factor
    assert Scores.load(again.path).kl_calibration == factor
    other = run_sensitivity(source, changed(SETTINGS, seed=1), tmp_path).scores
    assert other.kl_calibration is None


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
        run_sensitivity(source, changed(SETTINGS, **{field: value}), tmp_path / "out")
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
    again = changed(SETTINGS, sequences=3)
    restarted = run_sensitivity(source, again, tmp_path / "out", restart=True)
    assert len(forwards) == 3
    assert restarted.path.read_bytes() == run_sensitivity(source, again, tmp_path / "fresh").path.read_bytes()


def test_another_batch_size_may_resume(source: ModelSource, tmp_path: Path, forwards: list[tuple[int, ...]]) -> None:
    whole = run_sensitivity(source, SETTINGS, tmp_path / "whole").scores
    stopped(source, SETTINGS, tmp_path / "out", 2)
    forwards.clear()
    resumed = run_sensitivity(source, changed(SETTINGS, batch_size=4), tmp_path / "out").scores
    assert [len(batch) for batch in forwards] == [2, 2]
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
        run_sensitivity(source, changed(SETTINGS, **{field: value}), tmp_path / "out")


def said(folder: Path, source: ModelSource, enough: Callable[[Scores], bool], **how: object) -> tuple[int, list[str]]:
    """Return how many sequences a run measured that may stop early, and its remarks."""
    decoder = how.pop("decoder", DECODER)
    run = run_sensitivity(source, changed(SETTINGS, **how), folder, is_enough=enough, decoder=decoder)
    assert run.scores.calibration is not None
    return run.scores.calibration.sequences, list(run.remarks)


def test_a_run_that_may_stop_early_does_so_at_four_and_each_doubling(
    source: ModelSource, tmp_path: Path, forwards: list[tuple[int, ...]]
) -> None:
    asked = []

    def enough(scores: Scores) -> bool:
        assert scores.calibration is not None
        asked.append(scores.calibration.sequences)
        return scores.calibration.sequences >= 8

    sequences, remarks = said(tmp_path / "out", source, enough, sequences=12)
    assert (sequences, asked, len(forwards)) == (8, [4, 8], 8)
    assert remarks[0] == "stable after 8 of 12 sequences: the others were not needed"
    alone = run_sensitivity(source, changed(SETTINGS, sequences=8), tmp_path / "eight").path.read_bytes()
    assert (tmp_path / "out" / "gradients.json").read_bytes() == alone


def test_a_run_that_is_never_stable_says_so(source: ModelSource, tmp_path: Path) -> None:
    sequences, remarks = said(tmp_path, source, lambda scores: False)
    assert (sequences, remarks[0]) == (6, "not known to be stable after all 6 sequences")


def test_a_run_that_is_stable_only_at_its_end_says_so(source: ModelSource, tmp_path: Path) -> None:
    def enough(scores: Scores) -> bool:
        return scores.calibration is not None and scores.calibration.sequences == 6

    sequences, remarks = said(tmp_path, source, enough)
    assert (sequences, remarks[0]) == (6, "stable after all 6 sequences")


def test_without_losses_there_is_no_plan_to_be_stable(source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--until-stable looks at plans.*\n.*--formats none"):
        said(tmp_path, source, lambda scores: True, decoder=Decoder({"key": (), "value": ()}))


@pytest.mark.parametrize(("name", "why"), [("xglm", "XGLMForCausalLM attends"), ("mistral-sliding", "sliding window")])
def test_where_no_loss_can_be_predicted_norms_are_measured_and_it_is_said_why(
    tmp_path: Path, name: str, why: str
) -> None:
    source = resolve(str(save_folder(tmp_path / "model", name)))
    text = changed(SETTINGS, data=(str(save_text(tmp_path / "text.txt")),), sequences=2)
    usual = Decoder(None, DECODER.window, layers="full")
    run = run_sensitivity(source, text, tmp_path / "out", decoder=usual)
    assert sum(why in remark for remark in run.remarks) == 1
    assert all(entry.key.gradient_norm and entry.key.loss_increase is None for entry in run.scores.layers)
    with pytest.raises(UsageError, match=why):  # formats that were named are not left out in silence
        run_sensitivity(source, text, tmp_path / "named", decoder=replace(DECODER, layers="full"))
    none = run_sensitivity(source, text, tmp_path / "none", decoder=Decoder({"key": (), "value": ()}))
    assert not any(why in remark for remark in none.remarks)


def test_layers_that_slide_are_scored_where_they_are_not_left_alone(tmp_path: Path) -> None:
    source = resolve(str(save_folder(tmp_path / "model", "mistral-sliding")))
    text = changed(SETTINGS, data=(str(save_text(tmp_path / "text.txt")),), sequences=2)
    scores = run_sensitivity(source, text, tmp_path / "out").scores
    assert [sorted(entry.value.loss_increase) for entry in scores.layers] == [["int3g8"]] * 2
    assert scores.geometry is not None
    assert [layer.skipped for layer in scores.geometry.layers] == [None, None]


def test_each_text_of_a_mix_keeps_the_mean_of_its_own_sequences(source: ModelSource, tmp_path: Path) -> None:
    other = tmp_path / "digits.txt"
    other.write_text("\n".join(str(7**row * 10**40) for row in range(9)))
    mixed = run_sensitivity(source, changed(SETTINGS, data=("builtin", f"{other}:2")), tmp_path / "mixed").scores
    assert mixed.calibration is not None
    assert mixed.calibration.source_of is not None
    value = mixed.layers[1].value
    for place, name in enumerate(("builtin", str(other))):
        own = [row for row, of in enumerate(mixed.calibration.source_of) if of == place]
        assert len(own) == 2 * (place + 1)
        samples = value.loss_increase_samples["int3g8"]
        mean = sum(samples[row] for row in own) / len(own)
        assert value.loss_increase_by_source[name]["int3g8"] == pytest.approx(mean, rel=1e-12)
    spread = np.std(samples, ddof=1) / np.sqrt(6)
    assert value.loss_increase_stderr["int3g8"] == pytest.approx(spread, rel=1e-9)
    assert value.loss_increase["int3g8"] == pytest.approx(np.mean(samples), rel=1e-12)


def test_sequences_that_read_nothing_quantized_are_counted_aloud(source: ModelSource, tmp_path: Path) -> None:
    text = tmp_path / "rows.txt"
    text.write_text("abcdefghijklmnopqrstuvw\nabc\nbcd\n")
    run = run_sensitivity(source, changed(SETTINGS, data=(str(text),), sequences=3), tmp_path / "out")
    assert any(remark.startswith("2 of 3 sequences end before anything is quantized") for remark in run.remarks)


def test_a_run_that_failed_at_its_first_sequence_forbids_no_other_settings(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KvprofError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "gradient_norms", fail)
        with pytest.raises(KvprofError, match="out of memory"):
            run_sensitivity(source, SETTINGS, tmp_path / "out")
    run_sensitivity(source, changed(SETTINGS, sequence_length=20), tmp_path / "out")


SOUND = "the effects that were measured"
"""In an entry below: what the run wrote of its first sequence."""


@pytest.mark.parametrize(
    "entry",
    [
        "words",
        True,
        [[0, [[1.0, 1.0]], SOUND]],  # one layer of two
        [[0, [[1.0, 1.0], [1.0, 1.0]], []]],  # no effects
        [[9, [[1.0, 1.0], [1.0, 1.0]], SOUND]],  # a sequence that the text has not
        [[0, [[1.0, float("nan")], [1.0, 1.0]], SOUND]],
        [[0, [[1.0, -1.0], [1.0, 1.0]], SOUND]],
        [[[], [[1.0, 1.0], [1.0, 1.0]], SOUND]],
        [[True, [[1.0, 1.0], [1.0, 1.0]], SOUND]],
        [[0, [["1.0", 1.0], [1.0, 1.0]], SOUND]],
        [[0, [[10**400, 1.0], [1.0, 1.0]], SOUND]],
        [[0, [[1.0, 1.0], [1.0, 1.0]], SOUND]] * 2,  # one sequence twice
        [[0, [[1.0, 1.0], [1.0, 1.0]], [1.0] * 6]],  # the losses of an older kvprof
        [[0, [[1.0, 1.0], [1.0, 1.0]], ["?"] * 6]],
        [[0, [[1.0, 1.0], [1.0, 1.0]], [encode(1.0, [0.5])] * 6]],  # too few blocks
    ],
)
def test_a_journal_whole_but_of_nothing_that_was_measured_is_refused(
    entry: object, source: ModelSource, tmp_path: Path
) -> None:
    stopped(source, SETTINGS, tmp_path / "out", 1)
    journal = tmp_path / "out" / "gradients.journal"
    settings, written = journal.read_text().splitlines(keepends=True)[:2]
    sound = json.loads(written.split(" ", 1)[1])[1][0][2]
    assert len(sound) == 6
    changed = json.loads(json.dumps(entry).replace(json.dumps(SOUND), json.dumps(sound)))
    journal.write_text(settings + journals._line("0", changed))
    with pytest.raises(InvalidFile, match=r"does not hold what this command measures.*\n.*--restart"):
        run_sensitivity(source, SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out" / "gradients.json").exists()
    assert run_sensitivity(source, SETTINGS, tmp_path / "out", restart=True).path.exists()
