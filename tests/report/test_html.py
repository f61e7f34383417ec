"""The page as HTML: whole on its own, well formed, its numbers those of the files, text from files never markup."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
import report_factories

from kvprof.records.inventory import Inventory, RedFlag
from kvprof.report.html import to_html
from kvprof.report.page import Figure, Page
from kvprof.report.plots.embedding import page_svg
from kvprof.report.plots.projections import norms_figure
from kvprof.report.plots.style import HEAT_STEPS
from kvprof.report.plots.style import Page as Canvas
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


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a folder with a file of every kind, drawn once."""
    return to_html(make_page(gather(report_factories.save_all(tmp_path_factory.mktemp("all")))))


def words_of(page: Page) -> str:
    """The page without its pictures, which take most of its time."""
    sections = [
        replace(each, blocks=[replace(b, drawings=()) if isinstance(b, Figure) else b for b in each.blocks])
        for each in page.sections
    ]
    return to_html(replace(page, sections=sections))


def pictures(text: str) -> Iterator[ElementTree.Element]:
    """Every picture, read by a parser that forgives nothing."""
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        yield ElementTree.fromstring(svg)


def named(text: str, words: str) -> ElementTree.Element:
    """The first picture, which is the widest, whose description has these words."""
    return next(each for each in pictures(text) if words in (each.get("aria-label") or ""))


def middles(svg: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Where each mark that is pointed at has its middle, by what it says."""
    found = {}
    for mark in next(each for each in svg.iter("g") if each.get("class") == "marks"):
        left, top, width, height = map(float, re.findall(r"-?[\d.]+", mark.get("d", ""))[:4])
        found[mark[0].text or ""] = (left + width / 2, top + height / 2)
    return found


def axis_ticks(svg: ElementTree.Element) -> dict[str, dict[str, float]]:
    """Where the ticks of the first panel lie, by their numbers: `across` and `up`."""
    found: dict[str, dict[str, float]] = {"across": {}, "up": {}}
    parts = [each for each in svg.iter() if each.tag in ("use", "text")]
    for tick, label in itertools.pairwise(parts):
        if tick.tag == "use" and label.tag == "text" and "rotate" not in (label.get("transform") or ""):
            way, place = ("up", "y") if "text-anchor:end" in label.get("style", "") else ("across", "x")
            found[way].setdefault(label.text or "", float(tick.get(place, "")))
    return found


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
    assert not re.search(r"url\((?!#)|@import|//[a-z]+\.|https?:", text)


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
        assert len(middles(svg)) >= 8
        for mark in (each for group in svg.iter("g") if group.get("class") == "marks" for each in group):
            assert mark[0].tag == "title"
            assert re.search(r"\d", mark[0].text or "")


def test_pictures_share_no_id_and_refer_to_their_own(text: str) -> None:
    ids = [each.get("id") for svg in pictures(text) for each in svg.iter() if each.get("id")]
    assert len(ids) > 100
    assert len(ids) == len(set(ids))
    for svg in pictures(text):
        own = {each.get("id") for each in svg.iter()}
        used = [each.get("href", "#")[1:] for each in svg.iter("use")]
        used += re.findall(r"url\(#([^)]+)\)", ElementTree.tostring(svg, encoding="unicode"))
        assert used
        assert set(used) <= own


def test_no_colour_is_out_of_reach_of_the_dark_scheme(text: str) -> None:
    light, *dark = (set(scheme) for scheme in schemes(text))
    for svg in pictures(text):
        drawn = ElementTree.tostring(svg, encoding="unicode")
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b|rgb|<style", drawn)
        colours = [
            value for each in svg.iter() for value in re.findall(r"(?:fill|stroke):([^;]+)", each.get("style", ""))
        ]
        named = {value[6:-1] for value in colours if value.startswith("var(")}
        assert {value for value in colours if not value.startswith("var(")} <= {"none"} | set(
            re.findall(r"url\(.*?\)", drawn)
        )
        assert named <= light
        assert all(named <= names for names in dark)


def test_a_colour_that_the_page_has_no_name_for_is_an_error() -> None:
    figure = norms_figure(report_factories.norms(), Canvas(4.0, on_screen=True))
    figure.axes[0].lines[0].set_color("#123456")
    with pytest.raises(ValueError, match="#123456"):
        page_svg(figure, "p-", 400)


def test_the_same_files_make_the_same_bytes_whatever_the_settings_of_matplotlib(tmp_path: Path) -> None:
    report_factories.norms(skipped=(1,)).save(tmp_path / "norms.json")
    report_factories.gradients(skipped=(1,)).save(tmp_path / "gradients.json")
    page = make_page(gather(tmp_path))
    first = to_html(page)
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "another", "svg.fonttype": "path"}):
        assert to_html(page) == first
    assert len(list(pictures(first))) == 6
    assert not re.search(r"20\d\d-\d\d-\d\d", first)


def test_every_axis_has_its_unit(text: str) -> None:
    written = " ".join("".join(each.itertext()) for svg in pictures(text) for each in svg.iter("text"))
    for expected in (
        "spectral norm of the projection (units of its weights)",
        "Frobenius norm of the projection (units of its weights)",
        "largest singular value (units of the cache)",
        "singular value (units of the cache)",
        "gradient norm ± stderr (nats per unit of weight)",
        "predicted loss increase (nats per token)",
        "keys, stored bits per element",
        "stored bits per element (codes and scales)",
        "KL divergence (nats per token)",
        "position in the text (tokens)",
        "top-1 agreement (share of tokens)",
        "predicted loss increase (nats per token)",
        "measured KL divergence (nats per token)",
    ):
        assert expected in written


def test_the_numbers_of_the_tables_are_the_files(text: str) -> None:
    rows = Parsed(text).rows
    assert ["0", "9.250", "1.125", "8.22", "K", "30.00", "31.50", "0.952", "V", "-", "-"] in rows
    assert ["3", "0.5000", "1.125", "0.444", "V", "30.00", "34.50", "0.870", "V", "-", "-"] in rows
    assert ["2", "0.1875", "0.007812", "1.125", "0.04688"] in rows
    assert ["0", "int4g64", "4", "4.5", "rot2", "2", "2.25", ""] in rows
    assert ["3.5", "3.25", "3.5", "4.57", "-", "0.00781", "0.00078", "knee"] in rows
    measured = ["0.0156", "0.00098", "0.0469", "0.8750", "20.00", "1.00"]
    assert ["plan-3.00", "the plan", "3", *measured] in rows
    assert ["kvmix", "384-511", "256", "0.0938", "0.8125"] in rows
    assert ["1", "value", "int2g64", "0.000200", "0.000400", "1.0e-05"] in rows
    scores = report_factories.gradients()
    loss = (scores.layers[2].value.loss_increase or {})["rot3"]
    heads = next(row for row in rows if row[:1] == ["layer"] and "rot1" in row)
    start = rows.index(heads)
    assert rows[start + 3][heads.index("rot3")] == f"{loss:#.3g}"


def test_marks_say_the_same_numbers_as_the_files(text: str) -> None:
    scores = report_factories.gradients()
    for entry in scores.layers:
        for tensor in ("key", "value"):
            for name, loss in (entry.tensor(tensor).loss_increase or {}).items():  # type: ignore[arg-type]
                (tip,) = tips(text, f"layer {entry.layer}, {tensor}s {name} (")
                assert f": {loss:.3g} nats a token" in tip
    assert tips(text, "layer 1, keys: spectral norm") == ["layer 1, keys: spectral norm 8.25"]
    assert tips(text, "layer 3 keys: int2g64c") == ["layer 3 keys: int2g64c, 2 bits a code, 2.5 stored"]
    assert len(tips(text, "best plan at")) == 11
    assert tips(text, "plan-3.00: 3 ") == ["plan-3.00: 3 stored bits, 0.0156 ± 0.00098 nats a token measured"]
    assert tips(text, "layer 2, keys: gradient norm") == ["layer 2, keys: gradient norm 0.1875 ± 0.0078"]
    assert tips(text, "layer 1, no. 1: ") == ["layer 1, no. 1: keys 201 (181 to 221), values 49.8 (44.8 to 54.7)"]
    assert tips(text, "layer 1, keys: largest") == [
        "layer 1, keys: largest singular value 201 (180.9 to 221.1 over 3 heads)"
    ]
    held = ["layer 1, keys: values that hold 90% of the squares: 6"]  # 1 - 0.64 ** 6 is 0.93, 1 - 0.64 ** 5 is 0.89
    assert tips(text, "layer 1, keys: values that hold") == held
    assert tips(text, "kvmix, positions 384 to 511") == [
        "kvmix, positions 384 to 511: 0.0938 nats a token",
        "kvmix, positions 384 to 511: 0.812 of the tokens",
    ]
    assert tips(text, "layer 1, values int2g64: ") == [
        "layer 1, values int2g64: 0.0002 predicted, 0.0004 measured, nats a token"
    ]
    assert tips(text, "the plan: ") == ["the plan: 3 stored bits, 0.0125 nats a token predicted"]


def test_a_picture_puts_numbers_where_its_axis_says(text: str) -> None:
    """Read back from the pixels: the ticks say where 2 and 5 lie, the marks must lie where their numbers do."""
    svg = named(text, "best plan at every budget")
    ticks = axis_ticks(svg)
    a_bit = (ticks["across"]["6"] - ticks["across"]["3"]) / 3
    a_decade = ticks["up"]["0.001"] - ticks["up"]["0.01"]
    found = 0
    for words, (x, y) in middles(svg).items():
        if point := re.match(r"best plan at (\S+) stored bits: (\S+) nats", words):
            found += 1
            bits, nats = float(point[1]), 4.0 ** -float(point[1])
            assert x == pytest.approx(ticks["across"]["3"] + (bits - 3) * a_bit, abs=0.1)
            assert y == pytest.approx(ticks["up"]["0.01"] - (math.log10(nats) + 2) * a_decade, abs=0.1)
    assert found == 11


def test_what_is_pointed_at_lies_on_the_mark_that_is_drawn(text: str) -> None:
    for words, per_layer in (("norms of the key", 4), ("gradients of the loss", 2)):
        svg = named(text, words)
        drawn = {(float(use.get("x", "")), float(use.get("y", ""))) for use in svg.iter("use")}
        assert len(middles(svg)) == 4 * per_layer
        for x, y in middles(svg).values():
            assert any(abs(x - there) < 0.1 and abs(y - down) < 0.1 for there, down in drawn)


def test_bars_of_a_plan_are_as_high_as_their_bits(text: str) -> None:
    svg = named(text, "the plan")
    bars: dict[str, list[float]] = {"codes": [], "scales": []}
    for path in svg.iter("path"):
        sides = re.fullmatch(r"M[\d.]+ [\d.]+h([\d.]+)v-([\d.]+)h-\1z", path.get("d", ""))
        if sides and "fill:var(--key)" in path.get("style", ""):
            bars["scales" if "opacity" in path.get("style", "") else "codes"].append(float(sides[2]))
    codes, scales = bars["codes"][:4], bars["scales"][:4]
    assert codes[0] == pytest.approx(2 * codes[2], abs=0.15)
    assert codes[0] + scales[0] == pytest.approx(4.5 / 4 * codes[0], abs=0.15)


def test_a_heat_map_has_a_cell_for_each_layer_and_format_darker_where_more_is_lost(text: str) -> None:
    svg = named(text, "predicted loss of each tensor")
    where = middles(svg)
    scores = report_factories.gradients()
    losses = {entry.layer: entry.key.loss_increase or {} for entry in scores.layers}
    assert len(where) == sum(map(len, losses.values()))
    shades: dict[float, int] = {}
    for path in svg.iter("path"):
        cell = re.fullmatch(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-\3v-\4", path.get("d", ""))
        step = re.search(r"fill:var\(--h(\d+)\)", path.get("style", ""))
        if cell and step:
            x, y, width, height = map(float, cell.groups())
            for words, (left, top) in where.items():
                if abs(x + width / 2 - left) < 0.2 and abs(y + height / 2 - top) < 0.2:
                    layer, name = re.match(r"layer (\d+), keys (\w+) ", words).groups()  # type: ignore[union-attr]
                    shades[losses[int(layer)][name]] = int(step[1])
    assert len(shades) == len(where)
    ordered = [shades[loss] for loss in sorted(shades)]
    assert ordered == sorted(ordered)
    assert len(set(ordered)) > 6


def test_without_matplotlib_tables_stand_for_the_pictures(
    monkeypatch: pytest.MonkeyPatch, text: str, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bare = to_html(make_page(gather(report_factories.save_all(tmp_path))))
    assert "<svg" not in bare
    assert "pip install &#39;kvprof-bits[plot]&#39;" in bare
    names = {str(tmp_path), "all0"}
    assert [row for row in Parsed(bare).rows if not names & set(row)][:60] == Parsed(text).rows[:60]
    assert "The numbers" not in bare
    assert bare.count("<figcaption>") == text.count("<figcaption>")


def test_a_layer_that_keeps_a_window_is_drawn_as_left_alone(tmp_path: Path) -> None:
    text = to_html(make_page(gather(report_factories.save_all(tmp_path, skipped=(1,)))))
    Parsed(text)
    assert tips(text, "layer 1: left") == ["layer 1: left in full precision, sliding window of 512 tokens"]
    assert tips(text, "layer 1, keys int3g64 (") == []  # no plan gives it a format
    assert len(tips(text, "layer 2, keys int3g64 (")) == 1
    assert "leaves layer 1 alone" in text


def test_the_sentences_have_this_models_numbers(text: str) -> None:
    for words in (
        "By spectral norm, keys are larger in 3 of 4 layers (all but layer 3).",
        "8.22 times the value&#39;s in layer 0 and 0.444 times in layer 3",
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
    folder = report_factories.save_all(tmp_path)
    whole = words_of(make_page(gather(folder)))
    (folder / name).unlink()
    text = words_of(make_page(gather(folder)))
    lines = re.findall(r'<p class="missing">(.*?)</p>', text)
    assert any(f"<code>{command}" in line for line in lines)
    assert not re.search(r'<p class="missing">', whole)
    Parsed(text)


def test_each_file_alone_makes_a_page_that_names_it_and_no_other(tmp_path: Path) -> None:
    files = sorted(report_factories.save_all(tmp_path / "all").glob("*.json"))
    assert len(files) == 7
    for path in files:
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / path.name).write_bytes(path.read_bytes())
        text = words_of(make_page(gather(folder)))
        Parsed(text)
        assert [other.name for other in files if f"{path.stem}/{other.name}</td>" in text] == [path.name]


def test_text_from_files_stays_text(tmp_path: Path) -> None:
    model = {"id": EVIL, "fingerprint": "sha256:one", "architecture": EVIL, "num_layers": 4}
    text = report_factories.TEXT | {"dataset": EVIL, "split": EVIL, "fingerprint": EVIL}
    scores = report_factories.gradients(model=model)
    scores.save(tmp_path / "gradients.json")
    plan = report_factories.plan(scores, model=model, provenance={"scores": None, "command": EVIL})
    plan.save(tmp_path / "plan.json")
    frontier = report_factories.frontier(scores, model=model, command=f"kvprof frontier {EVIL}", metric=EVIL)
    frontier.save(tmp_path / "frontier.json")
    rival = report_factories.result(EVIL, "rival", 0.5, 2.0, "sha256:x")
    own = report_factories.result("plan", "plan", 0.25, 3.0, plan.digest)
    report_factories.evaluation(plan, model=model, text=text, plans=[own, rival]).save(tmp_path / "evaluation.json")
    audit = report_factories.audit(model=model, remarks=[EVIL])
    audit.save(tmp_path / "audit.json")
    report_factories.norms(model=model | {"fingerprint": "sha256:two"}, source=EVIL).save(tmp_path / "norms.json")
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
    report_factories.norms(model=model).save(tmp_path / "norms.json")
    text = to_html(make_page(gather(tmp_path)))
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_model_of_32_layers_makes_about_a_megabyte(tmp_path: Path) -> None:
    text = to_html(make_page(gather(report_factories.save_all(tmp_path, layers=32))))
    assert len(text.encode()) < 1.2 * 10**6


@pytest.mark.parametrize("numbers", [(0.0,), (1e308,), (5e-324,), (1e308, 5e-324, 0.0, 1.0)])
def test_numbers_that_have_no_place_on_an_axis_break_nothing(tmp_path: Path, numbers: tuple[float, ...]) -> None:
    given = itertools.cycle(numbers)
    value = report_factories.gradients().model_dump(mode="json", by_alias=True)
    for entry in value["layers"]:
        for tensor in ("key", "value"):
            entry[tensor] = {name: next(given) for name in ("gradient_norm", "spectral_norm", "frobenius_norm")}
            entry[tensor] |= {"gradient_norm_stderr": next(given), "loss_increase": {"int2g64": next(given)}}
    del value["calibration"]
    report_factories.gradients().from_json(value, "zeros").save(tmp_path / "gradients.json")
    zero = report_factories.result("plan", "plan", min(min(numbers), 1e-300), 3.0, "sha256:0")
    report_factories.evaluation(plans=[zero]).save(tmp_path / "evaluation.json")
    points = [
        point.model_dump() | {"predicted_kl_nats": next(given), "predicted_kl_stderr_nats": next(given)}
        for point in report_factories.frontier().points
    ]
    report_factories.frontier(points=points).save(tmp_path / "frontier.json")
    audited = [
        point.model_dump() | {"measured_nats": next(given), "scores": {"loss_increase": next(given)}}
        for point in report_factories.audit().points
    ]
    report_factories.audit(points=audited).save(tmp_path / "audit.json")
    text = to_html(make_page(gather(tmp_path)))
    Parsed(text)
    values = [value for svg in pictures(text) for each in svg.iter() for value in each.attrib.values()]
    assert values
    assert not [value for value in values if re.search(r"\b(nan|inf)\b", value)]


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def schemes(text: str) -> list[dict[str, str]]:
    """The colours of the page by name: light ones, and dark ones by the system's choice and by the reader's."""
    rules = re.findall(r"color-scheme:\w+;([^}]*)", text)
    return [dict(re.findall(r"--(\w+):(#[0-9a-f]{6});", rule)) for rule in rules]


def test_both_ways_to_a_dark_page_lead_to_the_same_colours(text: str) -> None:
    light, by_system, by_reader = schemes(text)
    assert by_system == by_reader
    assert light.keys() == by_system.keys()
    assert light != by_system


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_marks_stand_out_as_wcag_asks(dark: bool, text: str) -> None:
    colours = schemes(text)[dark]
    for ground in ("page", "panel"):
        for name in ("ink", "soft", "link", "flag"):
            assert contrast(colours[name], colours[ground]) >= 4.5
        for name in ("key", "value", "grey", "green", "pink", "sky", "amber"):
            assert contrast(colours[name], colours[ground]) >= 3
    for name in ("key", "value"):  # which are words, too
        assert contrast(colours[name], colours["page"]) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_heat_rises_in_lightness_alone_and_ends_far_from_the_page(dark: bool, text: str) -> None:
    colours = schemes(text)[dark]
    heat = [colours[f"h{step}"] for step in range(HEAT_STEPS)]
    assert f"h{HEAT_STEPS}" not in colours
    steps = [luminance(colour) for colour in heat]
    assert steps == sorted(steps, reverse=not dark)
    assert contrast(heat[-1], colours["page"]) > 10
