"""Every command of every page runs, in the order of the pages, as a new user would type it; links lead somewhere."""

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
from pages import (
    PAGES,
    README,
    ROOT,
    blocks,
    broken_links,
    commands,
    links,
    named_paths,
    prose,
    shown_outputs,
    without_numbers,
)
from quickstart import USUAL, Quickstart
from typer.testing import CliRunner

from kvprof import BitPlan
from kvprof.cli.app import COMMANDS, app
from kvprof.targets.registry import TARGETS

COMMANDS_OF_PAGES = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
"""What a reader of all pages would type, each once."""
ELSEWHERE = {
    "bash recipes/quickstart.sh": "the test of the quickstart runs it",
    "bash tests/run.sh": "it is what runs these tests",
}
SHOWN = {command: lines for page in PAGES for command, lines in shown_outputs(page).items()}
"""The lines that pages show of what commands print."""
LINES = {README: 250}
"""The most lines that a page may have, where it is not 300."""
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def test_the_list_of_pages_is_whole() -> None:
    folders = [ROOT / name for name in ("kvprof", "recipes", "tests", ".github")]
    found = {page for folder in folders for page in folder.rglob("*.md")} | set(ROOT.glob("*.md"))
    assert {page for page in found if "data" not in page.parts} == set(PAGES)


@every_page
def test_a_page_is_short_and_says_first_what_it_holds(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES.get(page, 300)
    assert lines[0].startswith("# ")
    assert lines[1] == ""
    assert not lines[2].startswith(("#", "|", "* ", "```"))


@every_page
def test_links_and_paths_of_a_page_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []
    assert [path for path in named_paths(page) if not (ROOT / path).exists()] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `name`, and more\n\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#a-name-and-more) [c](#here) [d](https://example.org/none) [e](.)"
    page.write_text(f"# Here\n\n{good} [f](none.md) [g](other.md#no-heading) [h](#there)\n")
    assert broken_links(page) == ["none.md", "other.md#no-heading", "#there"]


def test_the_first_page_links_to_every_other_page_once() -> None:
    linked = sorted((README.parent / to).resolve() for to in links(README))
    assert linked == sorted(page for page in PAGES if page != README)


def test_the_first_page_has_the_three_commands() -> None:
    for command in ("bash recipes/quickstart.sh", "kvprof norms", "kvprof gradients", "kvprof allocate --budget 2.5"):
        assert command in commands(README)
    assert set(ELSEWHERE) <= set(COMMANDS_OF_PAGES)


@pytest.mark.demo
def test_quickstart_runs_from_any_folder_and_ends_with_a_plan(quickstart: Quickstart) -> None:
    assert quickstart.output.count("written to outputs/demo/plan-2.50.json") == 2
    assert "gradients of demo on 2 sequences, 2048 tokens of builtin" in quickstart.output
    assert quickstart.output.splitlines()[-1] == "written to outputs/demo/plan-2.50.json"
    assert len(BitPlan.load(quickstart.folder / "plan-2.50.json").layers) == 30


@pytest.mark.demo
def test_the_quickstart_prints_what_the_pages_show(quickstart: Quickstart) -> None:
    shown = set(quickstart.commands) & set(SHOWN)
    assert shown >= {"kvprof norms", *USUAL}
    for command in shown:
        assert unprinted(command, quickstart.output) == []


@pytest.mark.demo
def test_every_command_of_the_pages_runs(tmp_path: Path, quickstart: Quickstart) -> None:
    shutil.copytree(quickstart.folder, tmp_path / "outputs" / "demo")
    save_folder(tmp_path / "my-model")
    rows = [{"text": row} for row in save_text(tmp_path / "rows.txt").read_text().splitlines()]
    (tmp_path / "my-text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copy(ROOT / "tests/data/kvtuner_llama31_8b_kivi_4_1.yaml", tmp_path / "kvtuner.yaml")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    with served(environment) as kvprof:
        for command in COMMANDS_OF_PAGES:
            if command in ELSEWHERE or command in quickstart.commands:
                continue
            words = shlex.split(command)
            folder = tmp_path
            if words[0] == "kvprof":
                status, said = kvprof(words[1:], folder)
                assert status == 0, f"{command}\n{said}"
                assert "Traceback" not in said
                assert unprinted(command, said) == []
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
    for body in (body for page in PAGES for body in blocks(page, "python")):  # on the files that the commands left
        done = subprocess.run(
            [sys.executable, "-c", body], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{body}\n{done.stderr}"


def unprinted(command: str, said: str) -> list[str]:
    """Return the lines that a page shows of a command, and that it did not print, numbers aside."""
    printed = set(map(without_numbers, said.splitlines()))
    return [line for line in SHOWN.get(command, []) if without_numbers(line) not in printed]


def test_a_line_that_a_command_does_not_print_is_found() -> None:
    said = SHOWN["kvprof norms"]
    assert unprinted("kvprof norms", "\n".join(said).replace("62.03", "7.5")) == []
    assert unprinted("kvprof norms", "\n".join(said[:-1])) == said[-1:]


@contextlib.contextmanager
def served(environment: dict[str, str]) -> Iterator[Callable[[list[str], Path], tuple[int, str]]]:
    """Yield what runs a command of kvprof's in a folder, and returns its exit code and all that it says."""
    command = [sys.executable, str(ROOT / "tests" / "command_server.py")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(words: list[str], folder: Path) -> tuple[int, str]:
            print(json.dumps([words, str(folder)]), file=server.stdin, flush=True)
            status, said = json.loads(server.stdout.readline())
            return status, said

        yield run


def test_the_json_files_in_the_pages_are_valid(tmp_path: Path) -> None:
    from kvprof.records.kinds import load_any

    kinds = []
    for number, body in enumerate(body for page in PAGES for body in blocks(page, "json")):
        path = tmp_path / f"{number}.json"
        path.write_text(body)
        kinds.append(type(load_any(path)).__name__)
    assert kinds == ["Scores", "BitPlan"]


@every_page
def test_every_flag_named_in_the_prose_of_a_page_exists(page: Path, help_texts: str) -> None:
    words = re.sub(r"`(?:python|bash) [^`]*`", "", prose(page))  # of another program
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", words)):
        assert flag in help_texts, flag


@pytest.fixture(scope="module")
def help_texts() -> str:
    """The help of every command, and the flags of other runtimes that kvprof writes."""
    runner = CliRunner()
    texts = [runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output for command in COMMANDS]
    texts += ["--install-completion"]  # kvprof's own, of no command
    return "\n".join([*texts, *(target.artefact for target in TARGETS.values())])
