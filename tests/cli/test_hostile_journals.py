"""A journal whose lines are whole and not a command's own: refused by name, and left where it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from folders import save_folder, save_text
from process_harness import COMMANDS
from test_commands import run

from kvprof.storage.journal import Journal, _line

BENCHMARK = ["benchmark", "out/plan.json", "model", "--context", "24", "--repeats", "2", "--out", "out"]
MEASURING = {name: COMMANDS[name] for name in ("norms", "gradients", "spectra", "divergence", "calibrate", "evaluate")}
MEASURING["benchmark"] = BENCHMARK
JUNK: tuple[Any, ...] = (
    None, "x", -1, [], {}, [[[0]]], float("nan"), 1e999, [1, [2], {"a": []}],
    {"digest": "zz", "scores": {"layer": 0, "key": {}, "value": {}}},
    {"kl_nats": [0.1], "agrees": [2], "nll_nats": "1"}, {"kl_nats": 5, "agrees": None, "nll_nats": 1.0},
)  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where every command was run to its end, and all journals are still there."""
    place = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(Journal, "remove", lambda self: None)
        save_folder(place / "model")
        save_text(place / "text.txt", rows=24)
        for name in ("norms", "gradients", "allocate", *MEASURING):
            result = run(*(COMMANDS | MEASURING)[name])
            assert result.exit_code == 0, result.output
    shutil.copytree(place / "out", place / "whole")
    return place


@pytest.fixture
def folder(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, to be damaged."""
    monkeypatch.chdir(kept)
    shutil.rmtree("out")
    shutil.copytree("whole", "out")
    return kept


def journal_of(name: str) -> Path:
    return Path("out") / f"{'evaluation' if name == 'evaluate' else name}.journal"


@pytest.mark.parametrize("name", MEASURING)
def test_what_a_command_did_not_write_is_refused(name: str, folder: Path) -> None:
    path = journal_of(name)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) > 1
    key, _ = json.loads(lines[-1].split(" ", 1)[1])
    for junk in JUNK:
        path.write_text("".join([*lines[:-1], _line(key, junk)]))
        result = run(*MEASURING[name])
        assert result.exit_code == 1, f"{junk}: {result.output}"
        assert "does not hold what this command measures" in " ".join(result.output.split())
        assert "--restart" in result.output
    path.write_text("".join(lines))
    assert run(*MEASURING[name]).exit_code == 0


@pytest.mark.parametrize("name", MEASURING)
def test_a_key_that_a_command_does_not_know_is_no_traceback(name: str, folder: Path) -> None:
    path = journal_of(name)
    lines = path.read_text().splitlines(keepends=True)
    _, result = json.loads(lines[-1].split(" ", 1)[1])
    for key in ("", "99", "reference 99", "x y z", "-1"):
        path.write_text("".join([*lines[:-1], _line(key, result)]))
        found = run(*MEASURING[name])
        assert found.exception is None or isinstance(found.exception, SystemExit), key
        assert found.exit_code in (0, 1)
