"""What the long commands say before and after, and that they can hold one block at a time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from folders import save_folder, save_text
from typer.testing import CliRunner, Result

from kvprof import Scores
from kvprof.cli.app import app
from kvprof.models import costs
from kvprof.records.estimate import Estimate
from kvprof.report.estimates import duration, show_estimate

TEXT = ["--data", "text.txt", "--pack"]
SHORT = ["--sequences", "4", "--sequence-length", "24", "--recent-tokens", "4", "--sink-tokens", "1"]
SMALL = [*TEXT, *SHORT]
FORMATS = ["--formats", "key:int2g8,value:int3g8"]
EVALUATED = ["--model", "model", "--data", "text.txt", "--pack", "--sequences", "2", "--sequence-length", "24"]


def kvprof(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture(autouse=True)
def place(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVPROF_CACHE", str(in_tmp / "cache"))
    save_folder(in_tmp / "model")
    save_text(in_tmp / "text.txt")
    return in_tmp


@pytest.fixture
def plan(place: Path) -> str:
    assert kvprof("gradients", "model", *SMALL, *FORMATS, "--out", "whole").exit_code == 0
    options = ["--budget", "6.5", "--sink-tokens", "1", "--recent-tokens", "4", "--formats", "key:int2g8,value:int3g8"]
    result = kvprof("allocate", "--scores", "whole/gradients.json", *options, "--out", "plan.json")
    assert result.exit_code == 0, result.output
    return "plan.json"


def test_streamed_gradients_are_those_of_the_whole_model(place: Path) -> None:
    for batch_size in ("1", "3"):
        for name, how in (("whole", []), ("streamed", ["--stream"])):
            command = ["gradients", "model", *SMALL, *FORMATS, "--batch-size", batch_size, *how, "--restart"]
            result = kvprof(*command, "--out", f"{name}{batch_size}")
            assert result.exit_code == 0, result.output
        files = [place / f"{name}{batch_size}" / "gradients.json" for name in ("whole", "streamed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_first_sequence_s_numbers_are_printed_when_it_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    """Those of a run on it alone; nothing is printed of a run that is over with its first batch."""
    told = r"first numbers, of 1 sequence: keys in int2g8 .* layer (\d): (\S+) nats.*; values in int3g8 .*: (\S+) nats"
    with caplog.at_level("INFO", "kvprof"):
        assert kvprof("gradients", "model", *SMALL, *FORMATS, "--out", "four").exit_code == 0
        found = re.findall(told, caplog.text)
        assert len(found) == 1
        caplog.clear()
        assert kvprof("gradients", "model", *SMALL, *FORMATS, "--sequences", "1", "--out", "one").exit_code == 0
        assert "first numbers" not in caplog.text
        assert kvprof("gradients", "model", *SMALL, "--formats", "none", "--out", "none").exit_code == 0
        assert "keys by gradient norm matter most in layer" in caplog.text
    layers = Scores.load("one/gradients.json").layers
    keys = [entry.key.loss_increase["int2g8"] for entry in layers]
    values = [entry.value.loss_increase["int3g8"] for entry in layers]
    (layer, key, value) = found[0]
    assert (int(layer), float(key)) == (keys.index(max(keys)), pytest.approx(max(keys), rel=1e-2))
    assert float(value) == pytest.approx(max(values), rel=1e-2)


def test_a_streamed_model_writes_text_itself_as_the_whole_one_does(place: Path) -> None:
    text = ["--data", "self", "--pack", *SHORT]
    for name, how in (("whole", []), ("streamed", ["--stream"])):
        result = kvprof("gradients", "model", *text, *FORMATS, *how, "--out", name)
        assert result.exit_code == 0, result.output
    assert (place / "whole/gradients.json").read_bytes() == (place / "streamed/gradients.json").read_bytes()


def test_text_that_would_read_the_weights_too_often_is_left_out_or_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvprof.calibration.self_generated.STREAMED_BYTES", 10)
    refused = kvprof("gradients", "model", "--data", "self", "--pack", *SHORT, *FORMATS, "--stream")
    assert refused.exit_code == 2
    assert "weights would be read 24 times" in refused.output
    monkeypatch.setattr("kvprof.calibration.self_generated.USUAL_DATA", ("text.txt", "self"))
    usual = ["--data", "text.txt", "--data", "self", "--pack", *SHORT]
    left = kvprof("gradients", "model", *usual, *FORMATS, "--stream", "--out", "left")
    assert left.exit_code == 0, left.output
    assert "the text is text.txt alone" in left.output
    assert Scores.load("left/gradients.json").calibration.dataset == "text.txt"


@pytest.mark.parametrize("exact", [[], ["--exact"]])
def test_a_streamed_evaluation_is_that_of_the_whole_model(exact: list[str], plan: str, place: Path) -> None:
    for name, how in (("one", []), ("other", ["--stream"])):
        result = kvprof("evaluate", plan, *EVALUATED, "--no-rivals", *exact, *how, "--out", name)
        assert result.exit_code == 0, result.output
    assert (place / "one/evaluation.json").read_bytes() == (place / "other/evaluation.json").read_bytes()


def test_a_streamed_divergence_is_that_of_the_whole_model(place: Path) -> None:
    for name, how in (("one", []), ("other", ["--stream"])):
        result = kvprof("divergence", "model", *SMALL, *FORMATS, *how, "--out", name)
        assert result.exit_code == 0, result.output
    assert (place / "one/divergence.json").read_bytes() == (place / "other/divergence.json").read_bytes()


def test_shards_merge_to_the_file_of_one_run(place: Path) -> None:
    assert kvprof("gradients", "model", *SMALL, *FORMATS, "--out", "whole").exit_code == 0
    for number in range(1, 5):
        result = kvprof("gradients", "model", *SMALL, *FORMATS, "--shard", f"{number}/4", "--out", "parts")
        assert result.exit_code == 0, result.output
    parts = sorted(map(str, (place / "parts").glob("*.json")))
    assert parts == [f"{place}/parts/gradients-{number}-of-4.json" for number in range(1, 5)]
    result = kvprof("merge", *parts, "--out", "merged")
    assert result.exit_code == 0, result.output
    assert (place / "merged/gradients.json").read_bytes() == (place / "whole/gradients.json").read_bytes()
    for words, code in (([parts[0]], 1), ([*parts, parts[0]], 2), (["whole/gradients.json"], 1), (["none.json"], 1)):
        again = kvprof("merge", *words, "--out", "bad")
        assert again.exit_code == code, again.output
        assert "Traceback" not in again.output
    other = kvprof("gradients", "model", *SMALL, *FORMATS, "--dtype", "bfloat16", "--shard", "2/4", "--out", "other")
    assert other.exit_code == 0
    mixed = kvprof("merge", parts[0], "other/gradients-2-of-4.json", *parts[2:], "--out", "mixed")
    assert mixed.exit_code == 4
    assert "they differ in dtype" in mixed.output
    assert not (place / "mixed").exists()


def test_a_shard_is_no_scores_to_allocate_by(place: Path) -> None:
    assert kvprof("gradients", "model", *SMALL, *FORMATS, "--shard", "1/2", "--out", "parts").exit_code == 0
    result = kvprof("allocate", "--scores", "parts/gradients-1-of-2.json", "--budget", "6.5")
    assert result.exit_code == 1
    assert "kvprof merge" in result.output
    assert kvprof("show", "parts/gradients-1-of-2.json").exit_code == 0


@pytest.mark.parametrize(
    "command",
    [
        ["norms", "model"],
        ["gradients", "model", *SMALL, *FORMATS],
        ["gradients", "model", *SMALL, *FORMATS, "--stream", "--shard", "1/2"],
        ["divergence", "model", *SMALL, *FORMATS],
    ],
)
def test_a_dry_run_says_what_it_would_take_and_writes_nothing(command: list[str], place: Path) -> None:
    result = kvprof(*command, "--dry-run")
    assert result.exit_code == 0, result.output
    assert re.match(r"estimate: .*of memory .*on disk$", result.stdout.strip())
    assert not (place / "outputs").exists()
    assert not (place / "cache").exists()


def test_a_dry_run_of_an_evaluation_measures_no_rival(plan: str, place: Path) -> None:
    result = kvprof("evaluate", plan, *EVALUATED, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 sequences, 48 tokens" in result.stdout
    assert not (place / "outputs").exists()


def test_a_run_says_its_estimate_before_and_what_it_took_after(place: Path) -> None:
    result = kvprof("gradients", "model", *SMALL, *FORMATS)
    before, after = result.output.index("estimate: 4 sequences, 96 tokens"), result.output.index("took ")
    assert before < after
    assert re.search(
        r"took \d+ s and [\d.]+ .iB of memory; estimated were about|estimated were \d+ s and", result.output
    )


def test_more_memory_than_is_free_is_advised_on(capsys: pytest.CaptureFixture[str]) -> None:
    show_estimate(Estimate(memory_bytes=10, free_bytes=9, disk_bytes=0), is_result=True)
    assert "--stream" in capsys.readouterr().err


def test_times_are_said_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (0.2, 59.4, 130, 12_000)] == ["1 s", "59 s", "2 min 10 s", "3 h 20 min"]


def test_a_streamed_run_is_reckoned_at_a_block_and_its_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import LlamaConfig

    monkeypatch.setattr(costs, "_multiplications_a_second", lambda *_: 1e12)
    big = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    counted = costs.costs_of(big)
    assert counted.weights == 70_553_706_496  # as Llama-3-70B's model card rounds
    assert counted.block == 855_654_400
    passes = costs.Passes(forwards=2, backwards=2)
    whole, streamed = (
        costs.reckon(counted, costs.Run([1024] * 8, passes, torch.bfloat16, torch.device("cpu"), stream, batch_size=8))
        for stream in (False, True)
    )
    assert whole.memory_bytes > 140e9
    assert (2 + 4) * counted.block < streamed.memory_bytes < 30e9  # a block, and what it is cast to
    assert streamed.disk_bytes == pytest.approx(8 * 1024 * 8192 * 4 * 80, rel=0.05)
    assert streamed.seconds > whole.seconds
    more = costs.Run([1024] * 8, passes, torch.bfloat16, torch.device("cpu"), False, batch_size=99_999)
    assert costs.reckon(counted, more).memory_bytes == whole.memory_bytes  # a batch has no more than there are


@pytest.mark.parametrize("name", ["mixtral", "llama", "gpt2", "falcon-mqa", "gemma3"])
def test_every_kind_of_model_can_be_reckoned(name: str) -> None:
    from tiny import TINY, tiny_model

    counted = costs.costs_of(TINY[name]())
    whole = sum(parameter.numel() for parameter in tiny_model(name).parameters())
    assert counted.weights == whole
    assert 0 < counted.block < whole
    assert counted.active <= whole + counted.head
