"""`kvprof generate`: two texts beside each other, the bytes of each, and every mistake in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import break_tokenizer, save_folder
from typer.testing import CliRunner, Result

from kvprof.cli.app import app

PROMPT = "the cat sat on a mat and saw another cat"


@pytest.fixture
def model(in_tmp: Path) -> Path:
    return save_folder(in_tmp / "model")


@pytest.fixture
def plan(in_tmp: Path) -> Path:
    tensors = {
        "key": {"bits": 2, "group_size": 4, "axis": "channel"},
        "value": {"bits": 2, "group_size": 8, "axis": "token"},
    }
    plan = {
        "schema": "kvprof.plan/1",
        "model": {"num_layers": 2},
        "quantizer": {"scale_dtype": "float16", "zero_dtype": "float16", "rotation_seed": 0},
        "window": {"sink_tokens": 1, "recent_tokens": 2},
        "layers": [{"layer": layer, **tensors} for layer in range(2)],
    }
    path = in_tmp / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def generate(*arguments: str | Path, input: str | None = None) -> Result:  # noqa: A002 - the runner's own name for it
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_both_texts_and_their_bytes_are_printed(model: Path, plan: Path) -> None:
    result = generate("--plan", plan, "--model", model, "--max-new-tokens", "8", PROMPT)
    assert result.exit_code == 0, result.output
    assert "full precision, float32" in result.output
    assert "full precision, float32                 plan " in result.output
    assert "times smaller, its window included" in result.output
    assert result.output.count("bytes (") == 2


def test_a_model_whose_config_wants_no_cache_is_given_one(in_tmp: Path, plan: Path) -> None:
    save_folder(in_tmp / "mpt", "mpt")
    assert json.loads((in_tmp / "mpt" / "config.json").read_text())["use_cache"] is False
    result = generate("--plan", plan, "--model", "mpt", "--max-new-tokens", "40", PROMPT)
    assert result.exit_code == 0, result.output
    held = (10 + 40 - 1) * 2 * 2 * 32 * 4  # tokens, layers, K and V, channels, bytes; the last token is not read
    assert f"{held} bytes (" in result.output


def test_a_prompt_comes_from_standard_input(model: Path, plan: Path) -> None:
    arguments = ("--plan", plan, "--model", model, "--max-new-tokens", "8")
    assert generate(*arguments, "-", input=PROMPT).stdout == generate(*arguments, PROMPT).stdout


def test_a_prompt_within_the_window_is_said_to_show_nothing(model: Path, plan: Path) -> None:
    result = generate("--plan", plan, "--model", model, "--max-new-tokens", "1", "the cat")
    assert "nothing was quantized" in result.stderr
    assert "every new token is the same; the planned cache is as large" in result.stdout


def test_mistakes_are_one_message_and_the_right_code(model: Path, plan: Path, in_tmp: Path) -> None:
    cases = {
        ("--plan", in_tmp / "none.json", PROMPT): (1, "no such file"),
        ("--plan", plan, "--model", model, ""): (2, "the prompt is empty"),
        ("--plan", plan, "--model", in_tmp / "nowhere", PROMPT): (1, "no model at"),
        ("--plan", plan, "--model", model, "--max-new-tokens", "0", PROMPT): (2, "--max-new-tokens 0"),
    }
    for arguments, (code, says) in cases.items():
        result = generate(*arguments)
        assert result.exit_code == code, result.output
        assert says in result.output
        assert "Traceback" not in result.output


def test_a_tokenizer_that_fails_on_the_prompt_is_one_message(model: Path, plan: Path) -> None:
    break_tokenizer(model)
    result = generate("--plan", plan, "--model", model, "--max-new-tokens", "8", "the cat sat")
    assert result.exit_code == 0, result.output
    result = generate("--plan", plan, "--model", model, "the dog sat")
    assert result.exit_code == 1
    assert "the tokenizer (" in result.output
    assert "fails on text: " in result.output
    assert "Check the tokenizer files of the model" in " ".join(result.output.split())


def test_another_models_plan_exits_with_4(model: Path, plan: Path) -> None:
    document = json.loads(plan.read_text())
    document["model"]["fingerprint"] = "sha256:another"
    plan.write_text(json.dumps(document))
    result = generate("--plan", plan, "--model", model, "--max-new-tokens", "4", PROMPT)
    assert result.exit_code == 4
    assert "for another model" in result.output
