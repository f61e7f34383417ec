"""Every measurement begins its windows as the tokenizer begins a text, prints so, and writes it into its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import begin_texts, break_tokenizer, save_folder, save_text
from typer.testing import CliRunner, Result

from kvprof.cli.app import app

REMARK = "every sequence begins with <unk>, as the tokenizer begins a text"


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """A model whose tokenizer begins every text with a mark, and text."""
    begin_texts(save_folder(in_tmp / "model"))
    save_text(in_tmp / "text.txt", rows=40)
    return in_tmp


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def said(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


TEXT = ("--data", "text.txt", "--pack", "--sequences", "4", "--sequence-length", "12")


@pytest.mark.parametrize("command", ["gradients", "spectra"])
def test_a_measurement_says_what_its_sequences_begin_with(folder: Path, command: str) -> None:
    assert REMARK in said(command, "model", *TEXT, "--out", "out")
    assert json.loads((folder / "out" / f"{command}.json").read_text())["calibration"]["begins_with"] == ["<unk>"]


def test_shards_are_merged_into_scores_that_say_so_and_an_evaluation_does(folder: Path) -> None:
    for number in "12":
        said("gradients", "model", *TEXT, "--out", "out", "--shard", f"{number}/2")
    shards = sorted(str(path) for path in (folder / "out").glob("*.json"))
    said("merge", *shards, "--out", "whole")
    assert json.loads((folder / "whole" / "gradients.json").read_text())["calibration"]["begins_with"] == ["<unk>"]
    said(
        "allocate",
        "--scores",
        "whole/gradients.json",
        "--metric",
        "gradient_norm",
        "--budget",
        "4",
        "--out",
        "plan.json",
    )
    assert REMARK in said("evaluate", "plan.json", "--model", "model", *TEXT, "--no-rivals", "--out", "out")
    evaluation = json.loads((folder / "out" / "evaluation.json").read_text())
    assert evaluation["text"]["begins_with"] == ["<unk>"]


@pytest.mark.parametrize("command", ["gradients", "spectra"])
def test_a_tokenizer_that_fails_on_the_text_is_one_message(folder: Path, command: str) -> None:
    break_tokenizer(folder / "model")
    (folder / "text.txt").write_text("the dog sat\n" * 40)
    result = run(command, "model", *TEXT, "--out", "out")
    assert result.exit_code == 1
    assert "fails on text: " in result.output
    assert "Check the tokenizer files of the model" in " ".join(result.output.split())
