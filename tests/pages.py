"""The Markdown pages of the repository: their blocks of code, the commands in these, their prose and their links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (
    README,
    ROOT / "kvprof/evaluate/README.md",
    ROOT / "kvprof/profile/README.md",
    ROOT / "kvprof/allocate/README.md",
    ROOT / "kvprof/report/README.md",
    ROOT / "recipes/README.md",
    ROOT / "recipes/cluster.md",
    ROOT / "kvprof/runtime/README.md",
    ROOT / "kvprof/api/README.md",
    ROOT / "kvprof/targets/README.md",
    ROOT / "kvprof/models/README.md",
    ROOT / "tests/README.md",
    ROOT / ".github/CONTRIBUTING.md",
    ROOT / ".github/CHANGELOG.md",
)
"""Every page, in the order in which its commands run: a command may read what an earlier page's wrote."""

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Return the bodies of a page's code blocks in a language, in order."""
    return [body for found, body in _BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> list[str]:
    """Return every command line of a page: the lines of its sh blocks, and what console blocks have behind "$ "."""
    found = []
    for language, body in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            found += body.strip().splitlines()
        elif language == "console":
            found += [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]
    return found


def shown_outputs(page: Path) -> dict[str, list[str]]:
    """Return the lines that a page shows of what each command of its console blocks prints."""
    shown: dict[str, list[str]] = {}
    for body in blocks(page, "console"):
        command, *lines = body.splitlines()
        shown[command.removeprefix("$ ")] = [line for line in lines if line.strip() not in ("", "...")]
    return shown


def without_numbers(line: str) -> str:
    """Return a line without what may differ from machine to machine: numbers, names of formats, bars, spacing."""
    line = re.sub(r"\b(?:int\d+g\d+c?|rot\d+)\b", "format", line)
    line = re.sub(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?", "0", line)
    return " ".join(re.sub("[\u2580-\u259f]", "", line).split())


def prose(page: Path) -> str:
    """Return a page without its code blocks and comments."""
    return re.sub(r"<!--.*?-->", "", _BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)


def links(page: Path) -> list[str]:
    """Return what the links of a page name within the repository, each as often as it is linked."""
    return [to for to in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"\w+:", to)]


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead to no file, no folder or no heading."""
    return [to for to in links(page) if not _leads_somewhere(page, to)]


def _leads_somewhere(page: Path, to: str) -> bool:
    path, _, anchor = to.partition("#")
    target = (page.parent / path).resolve() if path else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(page: Path) -> Iterator[str]:
    """Yield the anchors that GitHub gives to the headings of a page, of which no two are alike."""
    for heading in re.findall(r"^#+ +(.*?) *$", _BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def named_paths(page: Path) -> set[str]:
    """Return every path of the repository that a page names, in prose or in code."""
    text = page.read_text(encoding="utf-8")
    return {
        path.rstrip(".") for path in re.findall(r"(?<![\w./-])(?:kvprof|tests|recipes|\.github|\.ci)/[\w./-]*", text)
    }
