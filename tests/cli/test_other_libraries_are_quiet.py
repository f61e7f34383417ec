"""stderr of the commands, in processes of their own: kvprof's lines, and nobody else's."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import transformers
from folders import save_folder, save_text

import kvprof

OURS = (
    r"text\.txt: .* tokens in the median",
    r"most rows of text\.txt, .*",
    r"the same sequence is there more than once, .*",
    r"the text has only \d+ distinct tokens, .*",
    r"estimate: .* of memory .*",
    r"took .* of memory; estimated were .*",
    r"the baselines take their \w+ from .*",
    r"there is no .*: the baselines need \w+, measured now",
    r"the model writes \d+ sequences of \d+ tokens, once: kept in .*",
    r"first numbers, of \d+ sequence.*",
    r"not predicted: .*",
    r".* carries no information to rank them by",
    r"spectral K > V in .*",
    r"keys are normalised after k_proj: .*",
    r"only \d+% of the measured tokens .*",
    r"nothing was quantized: .*",
    r"\d+ of \d+ sequences .*",
)
TEXT = ("--data", "text.txt", "--pack", "--sequences", "2", "--sequence-length", "40", "--device", "cpu")
WINDOW = ("--sink-tokens", "1", "--recent-tokens", "4")


def said(*arguments: str) -> list[str]:
    """Run a command; return what it said on stderr, line by line."""
    done = subprocess.run(
        [sys.executable, "-m", "kvprof", *arguments],
        env=os.environ | {"KVPROF_CACHE": "cache", "COLUMNS": "500"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if line.strip()]


@pytest.fixture
def model(in_tmp: Path) -> str:
    """A folder whose config and generation config are as old exporters left them, and a row longer than the model."""
    save_folder(in_tmp / "model", "gpt2")
    config = json.loads((in_tmp / "model/config.json").read_text())
    (in_tmp / "model/config.json").write_text(json.dumps(config | {"loss_type": None}))
    (in_tmp / "model/generation_config.json").write_text(json.dumps({"temperature": 0.7, "do_sample": False}))
    tokenizer = json.loads((in_tmp / "model/tokenizer_config.json").read_text())
    (in_tmp / "model/tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 16}))
    save_text(in_tmp / "text.txt", rows=60)
    return "./model"


def test_only_kvprof_speaks(model: str) -> None:
    commands = (
        ("inspect", model),
        ("norms", model, "--out", "out"),
        ("gradients", model, *TEXT, "--data", "self", *WINDOW, "--formats", "int2g8", "--out", "out"),
        ("allocate", "--budget", "4", "--scores", "out/norms.json", "--group-size", "4", *WINDOW, "--out", "plan.json"),
        ("evaluate", "plan.json", *TEXT, "--out", "out"),
        ("generate", "the cat sat", "--plan", "plan.json", "--max-new-tokens", "8", "--device", "cpu"),
    )
    for words in commands:
        others = [line for line in said(*words) if not any(re.fullmatch(ours, line) for ours in OURS)]
        assert not others, (words[0], others)


def test_a_caller_hears_nothing_either_and_finds_logging_as_it_was(
    model: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kvprof"), "handlers", [])  # a command that ran in this process left one

    def state() -> tuple[object, ...]:
        loggers = [logging.getLogger(name) for name in ("transformers", "transformers.modeling_utils", "py.warnings")]
        shown = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
        return (*shown, *((each.level, len(each.handlers), each.propagate) for each in loggers), list(warnings.filters))

    transformers.logging.set_verbosity_info()
    try:
        before = state()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            inside = state()
            kvprof.gradients(model, data="text.txt", pack=True, sequences=1, sequence_length=40, formats="none")
            assert state() == inside
        assert state() == before
        assert not heard
        assert capfd.readouterr().err == ""
    finally:
        transformers.logging.set_verbosity_warning()
