"""How commands speak: --json prints one record that keeps its schema, --quiet prints nothing, tables fit 80 columns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from folders import save_folder, save_text
from test_commands import run

from kvprof.cli.app import COMMANDS

TEXT = ("--data", "text.txt", "--sequences", "2", "--sequence-length", "48", "--pack")
DECODER = ("--sink-tokens", "0", "--recent-tokens", "8")
FORMATS = "key:int2g16,key:int4g16,value:int2g8,value:int4g8"
PLAN = "out/plan-6.00.json"

LINES: dict[str, tuple[str, ...]] = {
    "inspect": ("./model",),
    "norms": ("./model", "--out", "out"),
    "spectra": ("./model", *TEXT, "--out", "out"),
    "gradients": ("./model", *TEXT, *DECODER, "--formats", FORMATS, "--out", "out"),
    "allocate": ("--budget", "6", "--scores", "out/gradients.json", "--out", "out"),
    "frontier": ("--scores", "out/gradients.json", "--points", "3", "--out", "out"),
    "explain": (PLAN, "--layer", "0", "--scores", "out/gradients.json"),
    "diff": (PLAN, PLAN),
    "evaluate": (PLAN, *TEXT, "--no-rivals", "--out", "out"),
    "divergence": ("./model", *TEXT, *DECODER, "--formats", "key:int2g16,value:int2g8", "--out", "out"),
    "calibrate": (PLAN, "--scores", "out/gradients.json", "--sequences", "1"),
    "audit": ("out/divergence.json", "--scores", "out/gradients.json", "--out", "out"),
    "benchmark": ("int4g64", "--shape", "llama-3-8b", "--layers", "1", "--attention-only", "--context", "64",
                  "--repeats", "1", "--out", "out"),
    "generate": ("--plan", PLAN, "a b c", "--max-new-tokens", "4"),
    "show": (PLAN,),
    "validate": (PLAN, "./model"),
    "verify": (PLAN, "--model", "./model"),
    "schema": ("plan",),
    "merge": ("shards/gradients-1-of-2.json", "shards/gradients-2-of-2.json", "--out", "merged"),
    "targets": (),
    "export": (PLAN, "--to", "transformers"),
    "import": ("kvtuner.yaml", "--from", "kvtuner", "--out", "out"),
    "report": ("./model", "--out", "out"),
    "plot": (PLAN, "--out", "out/plots"),
    "run": ("quickstart", "--model", "./model", "--out", "ran", "--dry-run"),
}  # fmt: skip
"""A line for each command, in an order in which each finds what it reads."""
LINES = {k: v for k, v in LINES.items() if k in COMMANDS}


def schema_of(word: str) -> dict[str, object]:
    return json.loads(run("schema", word).stdout)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every line runs."""
    folder = tmp_path_factory.mktemp("workplace")
    save_folder(folder / "model")
    save_text(folder / "text.txt")
    (folder / "kvtuner.yaml").write_text("0: {nbits_key: 4, nbits_value: 2}\n1: {nbits_key: 2, nbits_value: 2}\n")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for shard in ("1/2", "2/2"):
            done = run("gradients", "./model", *TEXT, "--formats", "none", "--shard", shard, "--out", "shards")
            assert done.exit_code == 0, done.output
    finally:
        os.chdir(before)
    return folder


def test_every_command_has_a_line_here() -> None:
    assert set(LINES) == set(COMMANDS)


def test_every_answer_is_one_json_value_that_keeps_its_schema(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command, words in LINES.items():
        done = run(command, *words, "--json")
        assert done.exit_code == 0, f"{command}: {done.output}"
        assert done.stdout.startswith("{"), f"{command}: {done.stdout}"
        answer = json.loads(done.stdout)
        schema = schema_of(command)
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(answer, schema)
        with pytest.raises(jsonschema.ValidationError):  # a schema that anything keeps would say nothing
            jsonschema.validate([answer], schema)


def test_quiet_prints_nothing_and_writes_the_same_file(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert run("norms", "./model", "--out", "loud").exit_code == 0
    for command, words in LINES.items():
        done = run(command, *words, "--quiet")
        assert done.exit_code == 0, f"{command}: {done.output}"
        assert done.output == "", command
    assert run("norms", "./model", "--out", "quiet", "-q").output == ""
    assert Path("quiet/norms.json").read_bytes() == Path("loud/norms.json").read_bytes()


def test_every_table_row_fits_eighty_columns(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command, words in LINES.items():
        if command == "schema":
            continue
        done = run(command, *words)
        assert done.exit_code == 0, f"{command}: {done.output}"
        rows = table_rows(done.stdout)
        assert max(map(len, rows), default=0) <= 80, f"{command}: {max(rows, key=len)}"


def table_rows(output: str) -> list[str]:
    """Return the rows of each table: headings, rule and what follows, up to the next line that is not indented."""
    rows, inside = [], False
    for line in output.splitlines():
        inside = line.startswith(" ") and (inside or set(line.strip()) == {"─"})
        if inside:
            rows.append(line)
    return rows


def test_a_dry_run_answers_an_estimate(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command in ("norms", "gradients", "divergence", "spectra"):
        done = run(command, *LINES[command], "--dry-run", "--json")
        assert done.exit_code == 0, done.output
        for word in ("estimate", command):
            jsonschema.validate(json.loads(done.stdout), schema_of(word))


def test_the_list_of_recipes_keeps_the_schema_of_run() -> None:
    for word in ("recipes", "run"):
        jsonschema.validate(json.loads(run("run", "--list", "--json").stdout), schema_of(word))


def test_a_failure_under_json_leaves_stdout_empty(in_tmp: Path) -> None:
    done = run("show", "none.json", "--json")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "no such file" in done.stderr


def test_json_and_quiet_together_are_refused(in_tmp: Path) -> None:
    done = run("targets", "--json", "--quiet")
    assert done.exit_code == 2
    assert "leave out one" in done.stderr


def test_an_error_is_printed_under_quiet(in_tmp: Path) -> None:
    done = run("show", "none.json", "--quiet")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no such file" in done.stderr


def kvprof(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvprof", *words],
        capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize(("words", "same"), [(["help"], ["--help"]), (["help", "norms"], ["norms", "--help"])])
def test_help_is_a_word_too(words: list[str], same: list[str]) -> None:
    asked, usual = kvprof(*words), kvprof(*same)
    assert (asked.returncode, asked.stdout) == (0, usual.stdout)


def test_the_version_names_what_results_depend_on() -> None:
    import torch
    import transformers

    lines = kvprof("--version").stdout.splitlines()
    assert lines[0].startswith("kvprof ")
    assert f"torch {torch.__version__}" in lines
    assert f"transformers {transformers.__version__}" in lines
    assert any(line.startswith("device ") for line in lines)


def test_a_pipe_gets_no_control_codes() -> None:
    assert "\x1b" not in kvprof("targets").stdout


def test_no_color_is_obeyed_on_a_terminal_too(in_tmp: Path) -> None:
    coloured = kvprof("show", "none.json", FORCE_COLOR="1").stderr
    plain = kvprof("show", "none.json", FORCE_COLOR="1", NO_COLOR="1").stderr
    assert re.search(r"\x1b\[[\d;]*31m", coloured)
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_options(shell: str) -> None:
    variables = {
        "bash": {"COMP_WORDS": "kvprof grad", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "kvprof grad"},
        "fish": {"_TYPER_COMPLETE_ARGS": "kvprof grad", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = kvprof(_KVPROF_COMPLETE=f"complete_{shell}", **variables)
    assert re.search(r"\bgradients\b", done.stdout), done.stderr


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (("nroms",), "norms"),
        (("allocate", "--budgt", "3"), "--budget"),
        (("allocate", "--budget", "3", "--metric", "spectrl_norm"), "spectral_norm"),
        (("allocate", "--budget", "3", "--rule", "kvmx"), "kvmix"),
        (("allocate", "--budget", "3", "--target", "lama.cpp"), "llama.cpp"),
        (("schema", "evaluaton"), "evaluation"),
        (("norms", "./modle"), "model"),
        (("norms", "demoo"), "demo"),
        (("gradients", "./model", "--data", "buildin"), "builtin"),
    ],
    ids=" ".join,
)
def test_a_misspelt_word_gets_the_nearest_right_one(in_tmp: Path, words: tuple[str, ...], nearest: str) -> None:
    save_folder(Path("model"))
    done = run(*words)
    assert done.exit_code in (1, 2)
    assert nearest in done.output.replace(" ".join(words), "")
    assert "Traceback" not in done.output
