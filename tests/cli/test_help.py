"""The screens of `kvprof --help` and of each command's, as a terminal of 80 columns shows them."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
from typer.testing import CliRunner

from kvprof.cli.app import COMMANDS, app

LISTED = {
    "Measure": ["inspect", "norms", "gradients", "spectra", "divergence"],
    "Plan": ["allocate", "frontier", "explain"],
    "Check": ["evaluate", "verify", "audit", "benchmark", "show"],
    "Share": ["report", "export", "import", "run"],
}
NAMED_ONLY = ["calibrate", "diff", "generate", "merge", "plot", "schema", "targets", "validate"]
VERBS = {"Check", "Choose", "Compare", "Compute", "Continue", "Draw", "Explain", "List", "Make", "Measure", "Merge",
         "Print", "Run", "Write"}  # fmt: skip
"""What a command's help may begin with: the imperative of what it does."""
OPTION_PANELS = ["Options", "Budget", "Text", "Formats", "Cache window", "Baselines", "Measurement", "Model and device",
                 "Output"]  # fmt: skip
PRIVATE_WORDS = r"\b(rivals?|contest|foretell|foretold|foreign|grammars?|doubts?|team|shelf|dearest|lent)\b"
every_command = pytest.mark.parametrize("name", COMMANDS)


@functools.cache
def screen(*words: str) -> list[str]:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def panels(lines: list[str]) -> dict[str, list[str]]:
    """Return the lines of each box, by its title."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("╭─ "):
            title = line.strip("╭─╮ ")
            assert title not in found
            found[title] = []
        elif line.startswith("│"):
            found[title].append(line)
    return found


def options_of(lines: list[str]) -> list[str]:
    """Return the options that begin a row of a box; a text that goes on in the next row is further to the right."""
    return [found[1] for line in lines if (found := re.match(r"│ (?:[* ]  )?(--[a-z-]+)", line))]


def help_line(name: str) -> str:
    lines = screen(name)
    (usage,) = (number for number, line in enumerate(lines) if line.startswith(f" Usage: kvprof {name} "))
    return lines[usage + 2].strip()


def test_the_list_of_commands_fits_a_screen_of_80_by_40() -> None:
    lines = screen()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


def test_the_list_has_four_panels_and_a_line_for_each_command() -> None:
    shown = {title: [line.split()[1] for line in inside] for title, inside in panels(screen()).items()}
    shown.pop("Options")
    assert shown == LISTED  # a help of two lines would show its second line's first word here
    assert {*itertools.chain(*LISTED.values()), *NAMED_ONLY} == set(COMMANDS)


def test_commands_that_are_not_listed_are_named_below() -> None:
    (line,) = (line for line in screen() if line.strip().startswith("More: "))
    assert line.strip() == f"More: {', '.join(NAMED_ONLY)}."


@every_command
def test_a_command_says_in_one_line_what_it_does(name: str) -> None:
    said = help_line(name)
    assert said.split()[0] in VERBS
    assert said.endswith(".")
    if name not in NAMED_ONLY:
        assert re.search(rf"^│ {name} +{re.escape(said)} +│$", "\n".join(screen()), re.MULTILINE)


@every_command
def test_the_options_that_most_users_need_come_first(name: str) -> None:
    lines = screen(name)
    assert max(map(len, lines)) <= 80
    shown = {title: options_of(inside) for title, inside in panels(lines).items() if title != "Arguments"}
    assert list(shown) == [title for title in OPTION_PANELS if title in shown]
    assert all(shown.values())
    assert len(shown.get("Options", [])) <= 5
    assert shown["Output"][-3:] == ["--json", "--quiet", "--help"]


@every_command
def test_help_asks_nothing_and_uses_no_private_word(name: str) -> None:
    text = " ".join(line.strip("│ ") for line in screen(name))
    assert "?" not in text
    text = re.sub(r"--(no-)?rivals|\[default: rivals\]|--target\b", "", text)  # an option's own name
    assert not re.search(PRIVATE_WORDS, text)
