"""The page in a browser: no complaints, nothing wider than a phone, no text cut or over another, what scripts add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import report_factories
from browser import CHROMIUM, in_browser, opened

from kvprof.report.html import to_html
from kvprof.report.whole import make_page
from kvprof.workspace.report_inputs import gather

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

LAYOUT = """(() => {
  for (const each of document.querySelectorAll("details")) each.open = true;
  const seen = (element) => element.getBoundingClientRect().width > 0;
  const problems = [];
  for (const svg of document.querySelectorAll("svg")) {
    if (!seen(svg)) continue;
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter((text) => !text.getAttribute("transform"));
    const boxes = texts.map((text) => [text, text.getBoundingClientRect()]);
    const name = svg.getAttribute("aria-label");
    for (const [text, box] of boxes)
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 ||
          box.bottom > frame.bottom + 1) problems.push(`${name}: ${text.textContent} is cut`);
    boxes.forEach(([one, a], place) => {
      for (const [other, b] of boxes.slice(place + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
          problems.push(`${name}: ${one.textContent} over ${other.textContent}`);
    });
  }
  const small = [...document.querySelectorAll("svg text")].filter((text) => seen(text.ownerSVGElement)).map((text) =>
    parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getBoundingClientRect().width /
    text.ownerSVGElement.viewBox.baseVal.width);
  return { inner: innerWidth, scroll: document.documentElement.scrollWidth, problems, least: Math.min(...small) };
})()"""


def save_page(folder: Path, layers: int) -> Path:
    """Write a page with a picture of every kind, of a model with one layer that slides."""
    report_factories.save_all(folder, layers=layers, skipped=(1,))
    path = folder / "report.html"
    path.write_text(to_html(make_page(gather(folder))), encoding="utf-8")
    return path


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return save_page(tmp_path / "outputs", layers=4)


def test_the_browser_complains_about_nothing_and_the_pages_own_script_runs(page: Path, tmp_path: Path) -> None:
    dom, log = opened(page, 1280, tmp_path / "profile")
    assert log == ""
    assert 'id="scheme"' in dom  # under the page's own policy


@pytest.mark.parametrize(("layers", "width"), [(4, 390), (30, 390), (30, 768), (30, 1280)])
def test_nothing_is_wider_than_the_window_cut_or_written_over(tmp_path: Path, layers: int, width: int) -> None:
    page = save_page(tmp_path / "outputs", layers)
    found, log = in_browser(page, width, tmp_path / "profile", LAYOUT)
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["problems"] == []
    assert found["least"] >= 8.5  # pixels of the smallest letters, on a phone too
    assert log == ""


def test_a_heading_that_is_pressed_sorts_its_table_by_number_both_ways(tmp_path: Path, page: Path) -> None:
    script = """(() => {
      const tables = [...document.querySelectorAll("table")];
      const table = tables.find((each) => each.caption.textContent.startsWith("Norms, in"));
      const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[1].textContent));
      const heading = table.tHead.rows[0].cells[1];
      heading.querySelector("button").click();
      const up = column(), first = heading.getAttribute("aria-sort");
      heading.querySelector("button").click();
      return { up, down: column(), first, second: heading.getAttribute("aria-sort") };
    })()"""
    found, _ = in_browser(page, 1280, tmp_path / "profile", script)
    assert len(found["up"]) > 3
    assert found["up"] == sorted(found["up"])
    assert found["down"] == sorted(found["down"], reverse=True)
    assert (found["first"], found["second"]) == ("ascending", "descending")


def test_the_scheme_is_the_systems_until_the_reader_chooses(tmp_path: Path, page: Path) -> None:
    script = """(() => {
      const ground = () => getComputedStyle(document.body).backgroundColor;
      const before = ground();
      document.querySelector("#scheme").click();
      return [before, ground()];
    })()"""
    light, _ = in_browser(page, 1280, tmp_path / "light", script)
    dark, _ = in_browser(page, 1280, tmp_path / "dark", script, dark=True)
    assert light == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]
    assert dark == light[::-1]


def test_a_mark_that_is_pointed_at_says_its_numbers(tmp_path: Path, page: Path) -> None:
    script = """(() => {
      const mark = document.querySelector("#weights .marks > *");
      const box = mark.getBoundingClientRect();
      const at = { bubbles: true, clientX: box.left, clientY: box.top };
      mark.dispatchEvent(new PointerEvent("pointermove", at));
      const tip = document.querySelector("#tip");
      const shown = [tip.hidden, tip.textContent];
      document.body.dispatchEvent(new PointerEvent("pointermove", at));
      return [...shown, tip.hidden];
    })()"""
    found: Any
    found, _ = in_browser(page, 1280, tmp_path / "profile", script)
    assert found == [False, "layer 0, keys: spectral norm 9.25", True]
