"""The page as Markdown: the same sections and numbers as the HTML, tables that are tables, text that stays text."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import report_factories

from kvprof.report.html import to_html
from kvprof.report.markdown import escape, to_markdown
from kvprof.report.page import Code, Commands, Page, Paragraph, Section, Table
from kvprof.report.whole import make_page
from kvprof.workspace.report_inputs import gather

CELL = re.compile(r"(?<!\\)\|")


@pytest.fixture
def text(tmp_path: Path) -> str:
    return to_markdown(make_page(gather(report_factories.save_all(tmp_path))))


def page(*blocks: Paragraph | Table | Commands) -> Page:
    return Page("t", "s", (), (Section("one", "One", blocks),), ())


def test_it_has_the_sections_of_the_html_in_its_order(tmp_path: Path, text: str) -> None:
    html = to_html(make_page(gather(tmp_path)))
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [heading.replace("_", r"\_") for heading in headings]


def test_every_row_of_the_html_is_a_row_here(tmp_path: Path, text: str) -> None:
    html = to_html(make_page(gather(tmp_path)))
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", html)]
    found = [
        [cell.strip().strip("*").replace("\\", "") for cell in CELL.split(line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    missing = [row for row in rows if row and [cell.replace("&#x27;", "'") for cell in row] not in found]
    assert missing == []
    assert len(rows) > 50


def test_the_rows_of_a_table_are_as_long_as_its_headings(text: str) -> None:
    lines = text.splitlines()
    lengths = [len(CELL.findall(line)) if line.startswith("|") else 0 for line in lines]
    tables = 0
    for before, here in pairwise(lengths):
        if before and here:
            assert before == here
        tables += bool(here and not before)
    assert tables > 10
    for place, line in enumerate(lines):
        if line.startswith("|") and not lines[place - 1].startswith("|"):
            assert re.fullmatch(r"(\| -+:? )+\|", lines[place + 1])


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>", "a|b", "*a* _b_ `c` [d](e) ![f](g) # h ~~i~~", "https://e.example/x", "a\n\n# b",
        "&lt;b&gt;", "\\<b>", "`<b>`", "\x1b[31m\u202e",
    ],
)  # fmt: skip
def test_text_from_files_is_no_markup(evil: str) -> None:
    table = Table(evil, (evil, "x"), [(evil, evil)])
    found = to_markdown(page(Paragraph((evil, Code(evil))), table, Commands([evil])))
    plain = re.sub(r"```sh\n.*?\n```|`[^`\n]+`", "", found, flags=re.DOTALL)  # what is code is shown as it stands
    assert not re.search(r"<[a-z/!]", found)
    assert not re.search(r"(?<!\\)[\[\]`!]|\x1b|\u202e", plain)
    assert not re.search(r"https?:|www\.", plain)
    assert len(re.findall(r"^# ", found, re.MULTILINE)) == 1
    rows = [line for line in found.splitlines() if line.startswith("|")]
    assert [len(CELL.findall(row)) for row in rows] == [3, 3, 3]


def test_a_number_in_text_is_left_as_it_is() -> None:
    assert escape("-0.25 and 1.5e-05") == "-0.25 and 1.5e-05"


def test_a_paragraph_begins_no_list() -> None:
    assert r"\- 3" in to_markdown(page(Paragraph("- 3")))
    assert r"\1. a" in to_markdown(page(Paragraph("1. a"))) or r"1\. a" in to_markdown(page(Paragraph("1. a")))


def test_an_evil_model_id_stays_text_in_the_whole_report(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    model = {"id": evil, "fingerprint": None, "num_layers": 4}
    report_factories.norms(model=model).save(tmp_path / "norms.json")
    found = to_markdown(make_page(gather(tmp_path)))
    assert "<script" not in found
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in found
