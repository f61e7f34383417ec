"""Weights that were saved without a tokenizer: one message, and --tokenizer for every command that reads text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from folders import save_folder, save_text
from typer.testing import CliRunner, Result

import kvprof
from kvprof.cli.app import app
from kvprof.errors import UsageError
from kvprof.records.scores import Scores

READS_TEXT = ["gradients", "spectra", "divergence", "calibrate", "evaluate", "generate", "verify", "run"]
SMALL = ["--data", "text.txt", "--sequences", "2", "--sequence-length", "24"]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


@pytest.fixture
def bare(in_tmp: Path) -> Path:
    """A folder of weights alone; its tokenizer is in the folder `tokens`, and a whole model in `whole`."""
    save_folder(in_tmp / "whole")
    save_text(in_tmp / "text.txt")
    (in_tmp / "tokens").mkdir()
    shutil.copytree(in_tmp / "whole", in_tmp / "bare")
    for file in (in_tmp / "bare").glob("tokenizer*"):
        file.rename(in_tmp / "tokens" / file.name)
    return in_tmp / "bare"


def plan_for(model: str, folder: str) -> None:
    """Measure a model, and plan: what the commands behind gradients need."""
    assert run(
        "gradients", model, *SMALL, "--formats", "int4g8,int8g8", "--recent-tokens", "4", "--sink-tokens", "0",
        "--out", folder,
    ).exit_code == 0  # fmt: skip
    made = run("allocate", "--scores", f"{folder}/gradients.json", "--budget", "8", "--out", f"{folder}/plan.json")
    assert made.exit_code == 0, made.output


def commands(model: str, *more: str) -> dict[str, list[str]]:
    """Return a command line of each command that reads text, in the folder that `plan_for` has filled."""
    return {
        "gradients": ["gradients", model, *SMALL, "--formats", "none", "--out", "o", *more],
        "spectra": ["spectra", model, *SMALL, "--out", "o", *more],
        "divergence": ["divergence", model, *SMALL, "--formats", "int4g8", "--recent-tokens", "4", "--out", "o", *more],
        "calibrate": ["calibrate", "p/plan.json", "--model", model, "--sequences", "1", *more],
        "evaluate": ["evaluate", "p/plan.json", "--model", model, *SMALL, "--no-rivals", "--out", "o", *more],
        "generate": [
            "generate",
            "the cat sat on a mat",
            "--plan",
            "p/plan.json",
            "--model",
            model,
            "--max-new-tokens",
            "3",
            *more,
        ],
        "verify": ["verify", "p/plan.json", "--model", model, *more],
        "run": ["run", "recipe.toml", "--model", model, "--out", "o", *more],
    }


@pytest.mark.parametrize("command", READS_TEXT)
def test_every_command_that_reads_text_takes_the_tokenizer_of_another_folder(bare: Path, command: str) -> None:
    plan_for("whole", "p")
    Path("recipe.toml").write_text(RECIPE)
    without = run(*commands("bare")[command])
    if command == "verify":  # which says of each check why it could not be made
        assert "no tokenizer in" in without.output
    else:
        assert without.exit_code == 1, without.output
        assert f"no tokenizer in {bare}" in without.output
        assert "--tokenizer NAME" in without.output
        assert isinstance(without.exception, SystemExit)
    for name in ("tokens", "tokens/tokenizer.json", "whole"):
        result = run(*commands("bare", "--tokenizer", name)[command])
        assert result.exit_code == 0, result.output
        assert "no tokenizer" not in result.output
        shutil.rmtree("o", ignore_errors=True)


RECIPE = """
description = "Gradient norms of a text."
model = "whole"
[text]
data = ["text.txt"]
[gradients]
sequences = 1
sequence_length = 24
formats = "none"
"""


def test_scores_are_those_with_the_models_own_tokenizer(bare: Path) -> None:
    first = run("gradients", "whole", *SMALL, "--formats", "none", "--out", "first")
    second = run("gradients", "bare", *SMALL, "--formats", "none", "--tokenizer", "tokens", "--out", "second")
    assert first.exit_code == second.exit_code == 0
    one, other = Scores.load("first/gradients.json"), Scores.load("second/gradients.json")
    assert one.layers == other.layers
    assert one.calibration == other.calibration


def test_functions_take_a_name_too(bare: Path) -> None:
    asked = {"data": "text.txt", "sequences": 1, "sequence_length": 24, "formats": "none"}
    named = kvprof.gradients("bare", tokenizer=bare.parent / "tokens", **asked)
    assert named.layers == kvprof.gradients("whole", **asked).layers
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained("bare", dtype="auto")
    assert kvprof.gradients(loaded, tokenizer="tokens", **asked).layers == named.layers
    with pytest.raises(UsageError, match="name the tokenizer too"):
        kvprof.gradients("bare", tokenizer=object(), **asked)


def test_a_tokenizer_that_cannot_be_loaded_is_told_in_the_librarys_own_words_all_of_them(bare: Path) -> None:
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')  # and no vocabulary
    from transformers import AutoTokenizer

    with pytest.raises(Exception, match="serialization file") as raised:
        AutoTokenizer.from_pretrained(bare)
    result = run("gradients", "bare", *SMALL)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "\n" in str(raised.value)
    assert " ".join(str(raised.value).split()) in said
    assert "--tokenizer NAME" in said


@pytest.mark.parametrize("name", ["nowhere/at/all", "bare", "text.txt"])
def test_a_tokenizer_that_is_none_is_refused(bare: Path, name: str) -> None:
    result = run("gradients", "bare", *SMALL, "--tokenizer", name, "--out", "o")
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert not Path("o/gradients.json").exists()
