"""What a notebook shows of a plan and of scores: every number, nothing that a page would run or fetch."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from score_factories import random_scores as scored

from kvprof import BitPlan, Scores
from kvprof.records.document import ModelInfo
from kvprof.records.plan import Budget, LayerPlan, Quantizer, SkippedLayer, TensorPlan, Window

VOID: frozenset[str] = frozenset({"br", "hr", "img", "meta", "link", "input"})
NASTY = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Reads HTML strictly: every tag is closed where it was opened; keeps rows, titles and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in VOID
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value or "" for name, value in attrs if name == "title"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def form(bits: int, axis: str) -> TensorPlan:
    return TensorPlan(scheme="asymmetric", bits=bits, group_size=32, axis=axis)  # type: ignore[arg-type]


def plan(name: str | None = "org/model") -> BitPlan:
    layers = [LayerPlan(layer=n, key=form(4 - n, "channel"), value=form(2, "token")) for n in (0, 1)]
    return BitPlan(
        model=ModelInfo(id=name, num_layers=3),
        budget=Budget(requested=2.75, unit="nominal", nominal_bits=2.75, stored_bits=3.75, bytes_per_token=120.0),
        quantizer=Quantizer(),
        window=Window(sink_tokens=4, recent_tokens=128),
        layers=tuple(layers),
        skipped=(SkippedLayer(layer=2, reason=f"sliding window {NASTY}"),),
    )


def test_a_plan_has_a_column_a_layer_and_bits_of_keys_above_those_of_values() -> None:
    page = Page(plan()._repr_html_())
    assert page.rows == [["layer", "0", "1", "2"], ["K", "4", "3", "16"], ["V", "2", "2", "16"]]
    assert page.titles[:2] == ["int4g32", "int3g32"]


def test_a_plan_tells_its_costs_in_all_units() -> None:
    text = Page(plan()._repr_html_()).text
    assert "costs 2.75 nominal bits an element, 3.75 stored bits an element, 120 bytes a token" in text
    assert "the first 4 and the last 128 tokens" in text


def test_what_a_file_says_is_shown_and_never_obeyed() -> None:
    html = plan(NASTY)._repr_html_()
    page = Page(html)
    assert NASTY in page.text
    assert f"full precision: sliding window {NASTY}" in page.titles
    assert page.tags == {"div", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.attributes == {"style", "title", "scope"}
    assert not re.search(r"url\(|https?:|@import|expression", html)


def test_no_colour_is_opaque_or_the_texts_own() -> None:
    for html in (plan()._repr_html_(), scored(3)._repr_html_()):
        colours = re.findall(r"(?:color|background|border)[^;:\"]*:([^;\"]+)", html)
        assert all(
            colour in ("inherit", "transparent", "collapse") or float(re.findall(r",([\d.]+)\)", colour)[0]) <= 0.5
            for colour in colours
        )


def test_a_plan_written_by_hand_is_shown_with_what_it_knows() -> None:
    bare = plan(None).model_copy(update={"budget": None})
    page = Page(bare._repr_html_())
    assert "bit plan for a model" in page.text
    assert "costs" not in page.text


def test_a_plan_with_a_geometry_tells_the_bytes_of_a_cache() -> None:
    import kvprof

    made = kvprof.allocate(scored(3), 3)
    assert f"{made.bytes_at(32768) / 1024**2:.2f} MiB at 32k" in Page(made._repr_html_()).text


def test_scores_have_a_table_a_metric() -> None:
    scores = Scores.from_json(
        {
            "schema": "kvprof.scores/1",
            "source": "norms",
            "layers": [
                {"layer": 0, "key": {"spectral_norm": 62.03}, "value": {"spectral_norm": 3.4}},
                {"layer": 1, "key": {"spectral_norm": 8.0}, "value": {"spectral_norm": 0.0}},
            ],
        },
        "mine.json",
    )
    page = Page(scores._repr_html_())
    assert page.rows == [["layer", "0", "1"], ["K", "62", "8"], ["V", "3.4", "0"]]
    assert page.titles == ["62.03", "8.0", "3.4", "0.0"]
    assert "spectral_norm" in page.text


@pytest.mark.parametrize("layers", [1, 3])
def test_scores_of_formats_name_them(layers: int) -> None:
    page = Page(scored(layers)._repr_html_())
    assert "loss_increase of" in page.text
