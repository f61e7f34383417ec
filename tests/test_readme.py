"""Every command in the README runs, in the order it stands there, as a new user would type it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import save_folder, save_text
from quickstart import Quickstart
from typer.testing import CliRunner

from kvprof import BitPlan
from kvprof.allocate.targets import TARGETS
from kvprof.cli.app import COMMANDS, app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

ELSEWHERE = {
    "bash recipes/quickstart.sh": "the test above runs it",
    "bash tests/run.sh": "it is what runs these tests",
}


def commands() -> list[str]:
    """Return every command line of the README's shell blocks, in order."""
    found = []
    for language, body in BLOCKS:
        if language == "sh":
            found += body.strip().splitlines()
        elif language == "console":
            found += [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]
    return found


def test_the_readme_has_the_three_commands() -> None:
    for command in ("kvprof norms", "kvprof gradients", "kvprof allocate --budget 2.5", *ELSEWHERE):
        assert command in commands()


@pytest.mark.demo
def test_quickstart_runs_from_any_folder_and_ends_with_a_plan(quickstart: Quickstart) -> None:
    assert quickstart.output.splitlines()[-1] == "written to outputs/demo/plan-2.50.json"
    assert len(BitPlan.load(quickstart.folder / "plan-2.50.json").layers) == 30


@pytest.mark.demo
def test_every_command_of_the_readme_runs(tmp_path: Path, quickstart: Quickstart) -> None:
    shutil.copytree(quickstart.folder, tmp_path / "outputs" / "demo")
    assert quickstart.commands == [command for command in commands() if command in quickstart.commands]
    save_folder(tmp_path / "my-model")
    rows = [{"text": row} for row in save_text(tmp_path / "rows.txt").read_text().splitlines()]
    (tmp_path / "my-text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copy(ROOT / "tests/data/kvtuner_llama31_8b_kivi_4_1.yaml", tmp_path / "kvtuner.yaml")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    with served(environment) as kvprof:
        for command in commands():
            if command in ELSEWHERE or command in quickstart.commands:
                continue
            words = shlex.split(command)
            folder = tmp_path
            if words[0] == "kvprof":
                status, said = kvprof(words[1:], folder)
                assert status == 0, f"{command}\n{said}"
                assert "Traceback" not in said
                continue
            if words[0] == "pip":  # what pip would do, without doing it to the environment under test
                words, folder = [sys.executable, "-m", *words[:2], "--dry-run", "--quiet", *words[2:]], ROOT
            if "/benchmarks/" in command:  # how fast this machine is just now decides nothing
                words += ["--quick"]
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if "/benchmarks/" in command:
                assert "holds" in done.stdout or "does not hold" in done.stdout, f"{command}\n{done.stderr}"
            else:
                assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr
    for body in (body for language, body in BLOCKS if language == "python"):  # on the files that the commands left
        done = subprocess.run(
            [sys.executable, "-c", body], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{body}\n{done.stderr}"


@contextlib.contextmanager
def served(environment: dict[str, str]) -> Iterator[Callable[[list[str], Path], tuple[int, str]]]:
    """Yield what runs a command of kvprof's in a folder, and returns its exit code and all that it says."""
    command = [sys.executable, str(ROOT / "tests" / "served.py")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(words: list[str], folder: Path) -> tuple[int, str]:
            print(json.dumps([words, str(folder)]), file=server.stdin, flush=True)
            status, said = json.loads(server.stdout.readline())
            return status, said

        yield run


def test_the_json_files_in_the_readme_are_valid(tmp_path: Path) -> None:
    from kvprof.records.kinds import load_any

    kinds = []
    for number, body in enumerate(body for language, body in BLOCKS if language == "json"):
        path = tmp_path / f"{number}.json"
        path.write_text(body)
        kinds.append(type(load_any(path)).__name__)
    assert kinds == ["Scores", "BitPlan"]


def test_every_flag_named_in_the_readme_exists() -> None:
    help_texts = "".join(
        CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output for command in COMMANDS
    )
    help_texts += "--install-completion"  # kvprof's own, of no command
    help_texts += "".join(target.artefact for target in TARGETS.values())  # other runtimes' flags
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`python [^`]*`", "", prose)  # of another program
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose)):
        assert flag in help_texts, flag
