"""The page as HTML: whole on its own, well formed, its numbers those of the files, text from files never markup."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import reported

from kvprof.records.inventory import Inventory, RedFlag
from kvprof.report.html import to_html
from kvprof.report.palette import COLOURS, heat
from kvprof.report.whole import make_page
from kvprof.workspace.report_inputs import gather

EVIL = '<script>alert("x")</script>&amp;<img src=//e.example onerror=x>'
VOID = {"meta", "link"}


class Parsed(HTMLParser):
    """What a page holds; raises where a tag is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data


@pytest.fixture
def text(tmp_path: Path) -> str:
    """The page of a folder with a file of every kind."""
    return to_html(make_page(gather(reported.save_all(tmp_path))))


def pictures(text: str) -> Iterator[ElementTree.Element]:
    """Every picture, read by a parser that forgives nothing."""
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        yield ElementTree.fromstring(svg)


def tips(text: str, begin: str) -> list[str]:
    """What the marks say that begin so, each once: a picture may be there in two widths."""
    found = [title.text or "" for svg in pictures(text) for title in svg.iter("title")]
    return list(dict.fromkeys(tip for tip in found if tip.startswith(begin)))


def test_the_page_is_well_formed_and_every_picture_is_xml(text: str) -> None:
    Parsed(text)
    assert len(list(pictures(text))) > 10


def test_nothing_in_it_leads_outside(text: str) -> None:
    outside = [
        (tag, name, value)
        for tag, attributes in Parsed(text).tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "xlink:href", "formaction", "poster")
        and not (value or "").startswith(("#", "data:"))
    ]
    assert outside == []
    assert not re.search(r"url\(|@import|//[a-z]+\.|https?:", text)


def test_its_own_policy_lets_nothing_load_and_no_other_script_run(text: str) -> None:
    import base64
    import hashlib

    policies = [a["content"] for tag, a in Parsed(text).tags if a.get("http-equiv") == "Content-Security-Policy"]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(policies) == len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policies[0] is not None
    assert f"script-src 'sha256-{digest}'" in policies[0]
    assert policies[0].startswith("default-src 'none';")


def test_every_picture_says_what_it_shows_and_every_mark_its_numbers(text: str) -> None:
    for svg in pictures(text):
        assert svg.get("role") == "img"
        assert len(svg.get("aria-label") or "") > 10
        assert all(mark[0].tag == "title" and mark[0].text for mark in svg.iter("g") if mark.get("class") == "mark")


def test_every_axis_has_its_unit(text: str) -> None:
    titles = {each.text for svg in pictures(text) for each in svg.iter("text") if each.get("class") == "title"}
    for expected in (
        "spectral norm, units of the weights (logarithmic)",
        "Frobenius norm, units of the weights",
        "singular value, cached units (logarithmic)",
        "gradient norm, nats per unit of weight (logarithmic)",
        "nats a token of KL divergence (logarithmic)",
        "keys: bits an element",
        "stored bits an element (codes and scales)",
        "KL divergence, nats a token (logarithmic)",
        "position in the sequence, tokens",
        "top-1 agreement, share of tokens",
        "predicted, nats a token (logarithmic)",
    ):
        assert expected in titles


def test_the_numbers_of_the_tables_are_the_files(text: str) -> None:
    rows = Parsed(text).rows
    assert ["0", "9.250", "1.125", "8.22", "K", "30.00", "31.50", "0.952", "V", "-", "-"] in rows
    assert ["3", "0.5000", "1.125", "0.444", "V", "30.00", "34.50", "0.870", "V", "-", "-"] in rows
    assert ["2", "0.1875", "0.007812", "1.125", "0.04688"] in rows
    assert ["0", "int4g64", "4", "4.5", "rot2", "2", "2.25", ""] in rows
    assert ["3.5", "3.25", "3.5", "4.57", "-", "0.00781", "0.00078", "knee"] in rows
    measured = ["0.0156", "0.00098", "0.0469", "0.8750", "20.00", "1.00"]
    assert ["1", "plan-3.00", "the plan", "3", *measured] in rows
    assert ["kvmix", "384-511", "256", "0.0938", "0.8125"] in rows
    assert ["1", "value", "int2g64", "0.000200", "0.000400", "1.0e-05"] in rows
    scores = reported.gradients()
    loss = (scores.layers[2].value.loss_increase or {})["rot3"]
    heads = next(row for row in rows if row[:1] == ["layer"] and "rot1" in row)
    start = rows.index(heads)
    assert rows[start + 3][heads.index("rot3")] == f"{loss:#.3g}"


def test_marks_say_the_same_numbers_as_the_files(text: str) -> None:
    scores = reported.gradients()
    for entry in scores.layers:
        for tensor in ("key", "value"):
            for name, loss in (entry.tensor(tensor).loss_increase or {}).items():  # type: ignore[arg-type]
                (tip,) = tips(text, f"layer {entry.layer}, {tensor}s {name} (")
                assert f": {loss:.3g} nats a token" in tip
    assert tips(text, "layer 1, keys: spectral norm") == ["layer 1, keys: spectral norm 8.25"]
    assert tips(text, "layer 3 keys: int2g64c") == ["layer 3 keys: int2g64c, 2 bits a code, 2.5 stored"]
    assert len(tips(text, "best plan at")) == 11
    assert tips(text, "1: plan-3.00")[0].endswith("3 stored bits, 0.0156 ± 0.00098 nats a token measured")


def test_a_picture_puts_numbers_where_its_axis_says(text: str) -> None:
    """Read back from the pixels: the ticks say where 2 and 5 lie, the marks must lie where their numbers do."""
    svg = next(each for each in pictures(text) if "Frontier" in (each.get("aria-label") or ""))
    ticks = [each for each in svg.iter("text") if each.get("class") == "tick"]
    lines = {tick.text: float(tick.get("x", "")) for tick in ticks if tick.get("text-anchor") == "middle"}
    pixels_a_bit = (lines["6"] - lines["3"]) / 3
    down = {tick.text: float(tick.get("y", "")) - 4 for tick in ticks if tick.get("text-anchor") == "end"}
    pixels_a_decade = down["0.001"] - down["0.01"]
    for mark in svg.iter("g"):
        title = next(iter(mark.iter("title")), None)
        found = None if title is None else re.match(r"best plan at (\S+) stored bits: (\S+) nats", title.text or "")
        if found is None:
            continue
        target = next(each for each in mark.iter("circle") if each.get("class") == "target")
        bits, nats = float(found[1]), 4.0 ** -float(found[1])
        assert float(target.get("cx", "")) == pytest.approx(lines["3"] + (bits - 3) * pixels_a_bit, abs=0.05)
        expected = down["0.01"] - (math.log10(nats) + 2) * pixels_a_decade
        assert float(target.get("cy", "")) == pytest.approx(expected, abs=0.1)


def test_bars_of_a_plan_are_as_high_as_their_bits(text: str) -> None:
    svg = next(each for each in pictures(text) if (each.get("aria-label") or "").startswith("Bits of each"))
    heights = {}
    for mark in svg.iter("g"):
        title = next(iter(mark.iter("title")), None)
        if title is not None and title.text:
            whole, codes = (float(rect.get("height", "")) for rect in list(mark.iter("rect"))[:2])
            heights[title.text.split(":")[0]] = whole, codes
    assert len(heights) == 8
    assert heights["layer 0 keys"][1] == pytest.approx(2 * heights["layer 2 keys"][1], abs=0.02)
    assert heights["layer 0 keys"][0] == pytest.approx(4.5 / 4 * heights["layer 0 keys"][1], abs=0.02)


def test_a_layer_that_keeps_a_window_is_drawn_as_left_alone(tmp_path: Path) -> None:
    text = to_html(make_page(gather(reported.save_all(tmp_path, skipped=(1,)))))
    assert tips(text, "layer 1: left") == ["layer 1: left in full precision, sliding window of 512 tokens"]
    assert tips(text, "layer 1, keys int3g64 (") == []  # no plan gives it a format
    assert len(tips(text, "layer 2, keys int3g64 (")) == 1
    assert "leaves layer 1 alone" in text


def test_the_sentences_have_this_models_numbers(text: str) -> None:
    for words in (
        "By spectral norm, keys are larger in 3 of 4 layers (all but layer 3).",
        "8.22 times the value&#x27;s in layer 0 and 0.444 times in layer 3",
        "Keys larger in 4 of 4 layers by spectral norm",
        "The gradient of W_k is the larger one in 0 of 4 layers. Of the keys, layer 3 has the largest, 0.25.",
        "Keys get 2.75 bits on average, values 2.25.",
        "It bends at 3.5 bits (0.00781 nats, 4.57 times smaller than 16 bits).",
        "At positions 256 to 383 it loses 0.00781, at positions 384 to 511 0.0234.",
        "better than all 2 others that store no more bits",
        "The score loss_increase ranks 8 tensors at 2 bits with 0.969",
        "for plan-3.00 0.0125 nats a token were predicted and 0.0156 measured",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("norms.json", "kvprof norms"),
        ("spectra.json", "kvprof spectra"),
        ("gradients.json", "kvprof gradients"),
        ("plan-3.00.json", "kvprof allocate --budget"),
        ("frontier.json", "kvprof frontier"),
        ("evaluation.json", "kvprof evaluate"),
        ("audit.json", "kvprof audit"),
    ],
)
def test_a_section_without_its_file_names_the_command_that_makes_it(tmp_path: Path, name: str, command: str) -> None:
    folder = reported.save_all(tmp_path)
    whole = to_html(make_page(gather(folder)))
    (folder / name).unlink()
    text = to_html(make_page(gather(folder)))
    lines = re.findall(r'<p class="missing">(.*?)</p>', text)
    assert any(f"<code>{command}" in line for line in lines)
    assert not re.search(r'<p class="missing">', whole)
    Parsed(text)


def test_each_file_alone_makes_a_page_that_names_it_and_no_other(tmp_path: Path) -> None:
    files = sorted(reported.save_all(tmp_path / "all").glob("*.json"))
    assert len(files) == 7
    for path in files:
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / path.name).write_bytes(path.read_bytes())
        text = to_html(make_page(gather(folder)))
        Parsed(text)
        assert [other.name for other in files if f"{path.stem}/{other.name}</td>" in text] == [path.name]


def test_text_from_files_stays_text(tmp_path: Path) -> None:
    model = {"id": EVIL, "fingerprint": "sha256:one", "architecture": EVIL, "num_layers": 4}
    text = reported.TEXT | {"dataset": EVIL, "split": EVIL, "fingerprint": EVIL}
    scores = reported.gradients(model=model)
    scores.save(tmp_path / "gradients.json")
    plan = reported.plan(scores, model=model, provenance={"scores": None, "command": EVIL})
    plan.save(tmp_path / "plan.json")
    frontier = reported.frontier(scores, model=model, command=f"kvprof frontier {EVIL}", metric=EVIL)
    frontier.save(tmp_path / "frontier.json")
    rival = reported.result(EVIL, "rival", 0.5, 2.0, "sha256:x")
    own = reported.result("plan", "plan", 0.25, 3.0, plan.digest)
    reported.evaluation(plan, model=model, text=text, plans=[own, rival]).save(tmp_path / "evaluation.json")
    audit = reported.audit(model=model, remarks=[EVIL])
    audit.save(tmp_path / "audit.json")
    reported.norms(model=model | {"fingerprint": "sha256:two"}, source=EVIL).save(tmp_path / "norms.json")
    files = gather(tmp_path)
    assert files.geometry is not None
    flag = RedFlag(name=EVIL, layers=(0, 1), why=EVIL)
    files = files.with_inventory(Inventory(model=files.model, geometry=files.geometry, red_flags=(flag,)))
    page = to_html(make_page(files))
    parsed = Parsed(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in parsed.tags}
    assert "".join(parsed.words).count(EVIL) > 8


def test_control_codes_from_files_do_not_reach_the_page(tmp_path: Path) -> None:
    model = {"id": "a\x1b[31m\u202eb", "fingerprint": None, "num_layers": 4}
    reported.norms(model=model).save(tmp_path / "norms.json")
    text = to_html(make_page(gather(tmp_path)))
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_model_of_126_layers_makes_less_than_3_megabytes(tmp_path: Path) -> None:
    text = to_html(make_page(gather(reported.save_all(tmp_path, layers=126))))
    assert len(text.encode()) < 3 * 10**6


def test_numbers_that_have_no_place_on_a_logarithmic_axis_break_nothing(tmp_path: Path) -> None:
    scores = reported.gradients()
    value = scores.model_dump(mode="json", by_alias=True)
    for entry in value["layers"]:
        for tensor in ("key", "value"):
            entry[tensor] = {"gradient_norm": 0.0, "loss_increase": {"int2g64": 0.0}, "spectral_norm": 0.0}
            entry[tensor]["frobenius_norm"] = 0.0
    del value["calibration"]
    reported.gradients().from_json(value, "zeros").save(tmp_path / "gradients.json")
    zero = reported.result("plan", "plan", 0.0, 3.0, "sha256:0")
    reported.evaluation(plans=[zero]).save(tmp_path / "evaluation.json")
    points = [point.model_dump() | {"predicted_kl_nats": 0.0} for point in reported.frontier().points]
    reported.frontier(points=points).save(tmp_path / "frontier.json")
    text = to_html(make_page(gather(tmp_path)))
    Parsed(text)
    coordinates = [value for svg in pictures(text) for each in svg.iter() for value in each.attrib.values()]
    assert not [value for value in coordinates if re.search(r"\b(nan|inf)\b", value)]


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_marks_stand_out_as_wcag_asks(dark: bool) -> None:
    colours = {name: pair[dark] for name, pair in COLOURS.items()}
    for ground in ("page", "panel"):
        for name in ("ink", "soft", "link", "flag"):
            assert contrast(colours[name], colours[ground]) >= 4.5
        for name in ("key", "value", "grey"):
            assert contrast(colours[name], colours[ground]) >= 3
    for name in ("key", "value"):  # which are words, too
        assert contrast(colours[name], colours["page"]) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_heat_rises_in_lightness_alone_and_ends_far_from_the_page(dark: bool) -> None:
    steps = [luminance(colour) for colour in heat(dark)]
    assert steps == sorted(steps, reverse=not dark)
    page = COLOURS["page"][dark]
    assert contrast(heat(dark)[-1], page) > 10
