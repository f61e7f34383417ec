"""Do pictures show every number of their records, with units, in colours that all eyes tell apart, nothing cut off?"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import record_factories
from benchmarked import benchmark
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvprof import Scores
from kvprof.errors import UsageError
from kvprof.report.plots.audit import audit_figure
from kvprof.report.plots.benchmark import benchmark_figure
from kvprof.report.plots.frontier import frontier_figure
from kvprof.report.plots.losses import losses_figure
from kvprof.report.plots.plan import plan_figure
from kvprof.report.plots.positions import positions_figure
from kvprof.report.plots.projections import gradients_figure, norms_figure
from kvprof.report.plots.spectra import layers_named, spectra_figure
from kvprof.report.plots.style import NothingToDraw, Page, save_figure
from kvprof.report.series import ranked_results

HYBRID = [layer for layer in range(26) if layer % 6 != 5]
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}

AUDITED = (("key", "int2g64", 2), ("value", "rot2", 2), ("key", "int3g64", 3), ("value", "int4g64", 4))
AGREED: dict[str, Any] = {
    "agreements": [{"label": "loss_increase", "group": "2 bits", "bits": 2, "tensors": 60, "spearman": 0.973}],
    "ratios": [
        {"label": "loss_increase", "group": "2 bits", "bits": 2, "tensors": 60, "median": 0.81, "low": 0.5,
         "high": 1.3, "worst": 3.0, "worst_layer": 2, "worst_tensor": "key"}
    ],
}  # fmt: skip

PICTURES: dict[str, Callable[[int, Any, Page], Figure]] = {
    "norms": lambda layers, skipped, page: norms_figure(record_factories.norms(layers, skipped), page),
    "spectra": lambda layers, skipped, page: spectra_figure(record_factories.spectra(layers, skipped), None, page),
    "gradients": lambda layers, skipped, page: gradients_figure(record_factories.gradients(layers, skipped), page),
    "losses": lambda layers, skipped, page: losses_figure(record_factories.gradients(layers, skipped), page),
    "plan": lambda layers, skipped, page: plan_figure(record_factories.plan(layers, skipped), "plan-2.50", page),
    "frontier": lambda layers, _, page: frontier_figure(
        record_factories.frontier(layers), ranked_results(record_factories.evaluation()), page
    ),
    "positions": lambda layers, _, page: positions_figure(record_factories.evaluation(layers), page),
    "audit": lambda layers, _, page: audit_figure(
        record_factories.audit(AUDITED, layers, **AGREED), "loss_increase", page
    ),
    "benchmark": lambda layers, _, page: benchmark_figure(benchmark(contexts=(4096, 131072), batches=(1, 8)), page),
}
MODELS = {"demo": (30, ()), "hybrid": (26, HYBRID), "deep": (80, ()), "two": (2, (0,))}


CASES = [
    (name, model)
    for name in PICTURES
    for model in MODELS
    if model == "demo" or name not in ("frontier", "positions", "audit", "benchmark")  # which know no layers
    if (name, model) != ("spectra", "hybrid")  # a dozen panels, as of the deep one: what a plan skips has spectra too
]


@functools.cache
def drawn(name: str, model: str = "demo", width: float | None = None) -> Figure:
    """Return a picture, drawn once for all tests that only look at it."""
    figure = PICTURES[name](*MODELS[model], Page(width))
    figure.draw_without_rendering()  # which puts every text in its place
    return figure


def boxes_of(figure: Figure) -> dict[Text, Any]:
    """Every text that is seen, and where: titles, labels, numbers along the axes, legends, notes."""
    unseen = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    unseen |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return {text: text.get_window_extent() for text in texts if text not in unseen}


@pytest.mark.parametrize("width", [None, 3.3])
@pytest.mark.parametrize(("name", "model"), CASES)
def test_no_text_is_cut_off_or_lies_on_another(name: str, model: str, width: float | None) -> None:
    figure = drawn(name, model, width)
    assert width is None or figure.get_figwidth() == width
    boxes = boxes_of(figure)
    assert len(boxes) > 5
    for text, box in boxes.items():
        assert -1 < box.x0 < box.x1 < figure.bbox.width + 1, text
        assert -1 < box.y0 < box.y1 < figure.bbox.height + 1, text
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = min(a.x1, b.x1) - max(a.x0, b.x0) <= 1 or min(a.y1, b.y1) - max(a.y0, b.y0) <= 1  # but for an edge
        assert apart, (one, other)


UNITS = {
    "norms": ("layer", "units of its weights"),
    "spectra": ("index", "units of the cache"),
    "gradients": ("layer", "nats per unit of weight"),
    "losses": ("layer", "stored bits per element"),
    "plan": ("layer", "stored bits per element"),
    "frontier": ("stored bits per element", "nats per token"),
    "positions": ("tokens", "nats per token"),
    "audit": ("nats per token", "nats per token"),
    "benchmark": ("tokens", "ms per step"),
}


@pytest.mark.parametrize("name", UNITS)
def test_every_axis_names_what_it_counts_and_the_unit(name: str) -> None:
    figure = drawn(name)
    across, upwards = UNITS[name]
    x_labels = " ".join(word for axes in figure.axes for word in axes.get_xlabel().split())
    y_labels = [" ".join(axes.get_ylabel().split()) for axes in figure.axes]
    assert across in x_labels
    assert any(upwards in label for label in y_labels)
    if name == "losses":
        assert y_labels[-1] == "predicted loss increase (nats per token)"  # of the colours


def lines(figure: Figure, panel: int = 0) -> list[tuple[list[float], list[float]]]:
    return [([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()])
            for line in figure.axes[panel].lines]  # fmt: skip


def test_norms_are_those_of_the_record() -> None:
    scores = record_factories.norms(7)
    figure = norms_figure(scores)
    for panel, norm in enumerate(("spectral_norm", "frobenius_norm")):
        shown = lines(figure, panel)
        for tensor in ("key", "value"):
            assert (list(range(7)), scores.column(norm, tensor)) in shown


def test_gradients_have_their_standard_errors() -> None:
    scores = record_factories.gradients(6)
    (axes,) = gradients_figure(scores).axes
    keys, values = axes.containers
    for container, tensor in ((keys, "key"), (values, "value")):
        (bars,) = container.lines[2]
        found = [sorted(float(y) for _, y in segment) for segment in bars.get_segments()]
        expected = []
        for entry in scores.layers:
            own = entry.tensor(tensor)
            norm, stderr = own.gradient_norm, own.gradient_norm_stderr
            expected.append([norm - stderr, norm + stderr])
        assert found == [pytest.approx(pair) for pair in expected]


def test_losses_have_a_cell_for_each_layer_and_format_by_stored_bits() -> None:
    scores = record_factories.gradients(5)
    keys, values, _bar = losses_figure(scores).axes
    for axes, tensor in ((keys, "key"), (values, "value")):
        names = [label.get_text().split()[0] for label in axes.get_yticklabels()]
        bits = [float(label.get_text().split()[1]) for label in axes.get_yticklabels()]
        assert bits == sorted(bits)
        cells = axes.collections[0].get_array()
        assert cells.shape == (len(names), 5)
        for row, name in enumerate(names):
            for layer in range(5):
                loss = scores.layers[layer].tensor(tensor).loss_increase[name]
                assert cells[row, layer] == loss
    assert keys.collections[0].norm.vmin == values.collections[0].norm.vmin  # colours mean the same in both
    assert type(keys.collections[0].norm).__name__ == "LogNorm"


def test_a_cell_without_a_loss_is_empty_and_a_loss_of_zero_is_not() -> None:
    layers = [
        {"layer": 0, "key": {"loss_increase": {"int2g64": 0.5}}, "value": {}},
        {"layer": 1, "key": {"loss_increase": {"int2g64": 0.0, "mystery": 0.1}}, "value": {}},
    ]
    scores = Scores.from_json({"schema": "kvprof.scores/1", "layers": layers}, "s")
    keys, _bar = losses_figure(scores).axes
    assert [label.get_text() for label in keys.get_yticklabels()] == ["int2g64  2.50", "mystery"]
    cells = keys.collections[0].get_array()
    assert cells.mask.tolist() == [[False, False], [True, False]]
    assert 0 < cells[0, 1] < 0.1  # below the least loss, for want of a logarithm


def test_a_plan_shows_codes_scales_and_the_name_of_each_format() -> None:
    plan = record_factories.plan(26, HYBRID)
    figure = plan_figure(plan)
    assert len(figure.axes) == 2
    for axes, tensor in zip(figure.axes, ("key", "value"), strict=True):
        codes, scales = axes.containers
        forms = [entry.tensor(tensor) for entry in plan.layers]
        assert [bar.get_height() for bar in codes] == [form.bits for form in forms]
        assert [bar.get_y() + bar.get_height() for bar in scales] == [float(form.stored_bits(64)) for form in forms]
        assert [text.get_text() for text in axes.texts] == [form.name for form in forms]
        assert [round(bar.get_x() + bar.get_width() / 2) for bar in codes] == [entry.layer for entry in plan.layers]
    keys, values = (axes.get_position() for axes in figure.axes)
    assert keys.y0 > values.y1  # K above V


def test_a_deep_plan_goes_on_in_further_rows_of_panels() -> None:
    figure = plan_figure(record_factories.plan(80))
    assert len(figure.axes) == 4
    assert sum(len(axes.texts) for axes in figure.axes) == 2 * 80


def test_a_format_name_never_leaves_its_panel() -> None:
    formats = {"key": ("int8g128c", "full"), "value": ("rot1", "full")}
    for axes in plan_figure(record_factories.plan(30, formats=formats)).axes:
        frame = axes.get_window_extent()
        assert all(text.get_window_extent().y1 <= frame.y1 for text in axes.texts)


def test_spectra_show_a_dozen_layers_or_those_that_are_asked_for() -> None:
    record = record_factories.spectra(80)
    shown = [axes.get_title() for axes in drawn("spectra", "deep").axes]
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == ("layer 0", "layer 79")
    figure = spectra_figure(record, [3, 41])
    assert [axes.get_title() for axes in figure.axes] == ["layer 3", "layer 41"]
    axes = figure.axes[1]
    assert axes.get_yscale() == "log"
    for line, band, tensor in zip(axes.lines, axes.collections, ("key", "value"), strict=True):
        spectrum = record.layers[41].tensor(tensor)
        assert list(line.get_xdata()) == list(range(1, 65))
        assert list(line.get_ydata()) == list(spectrum.mean)
        heights = {float(y) for _, y in band.get_paths()[0].vertices}
        assert heights == {*spectrum.low, *spectrum.high}


@pytest.mark.parametrize(("text", "layers"), [("0", [0]), ("0-2,7", [0, 1, 2, 7]), ("7, 7,6-7", [6, 7])])
def test_layers_are_named_one_by_one_or_in_runs(text: str, layers: list[int]) -> None:
    assert layers_named(text, record_factories.spectra(8)) == layers


@pytest.mark.parametrize(
    ("text", "problem"),
    [("8", "no spectrum of layer 8; of layers 0-7"), ("x", "cannot read 'x'"), ("3-1", "write 1-3"), ("", "cannot")],
)
def test_layers_that_are_not_there_are_named(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        layers_named(text, record_factories.spectra(8))


def test_a_frontier_has_its_curve_its_knees_and_every_rival_at_its_bits() -> None:
    frontier, evaluation = record_factories.frontier(), record_factories.evaluation()
    figure = frontier_figure(frontier, ranked_results(evaluation))
    shown = lines(figure)
    curve = ([point.stored_bits for point in frontier.points], [point.predicted_kl_nats for point in frontier.points])
    knees = ([point.stored_bits for point in frontier.knees], [point.predicted_kl_nats for point in frontier.knees])
    assert curve in shown
    assert knees in shown
    for result in evaluation.plans:
        assert ([result.stored_bits], [result.kl_nats]) in shown
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    measured = labels[labels.index("measured:") + 1 :]
    assert [label.rpartition(": ")[0] for label in measured] == [
        result.name for result in sorted(evaluation.plans, key=lambda result: result.kl_nats)
    ]
    alone = frontier_figure(frontier)
    assert alone.axes[0].get_ylabel() == "predicted KL divergence (nats per token)"


def test_positions_have_a_mark_for_each_stretch_of_each_plan() -> None:
    evaluation = record_factories.evaluation(first=40)
    figure = positions_figure(evaluation)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["40", "64", "128", "256", "512", "1,024"]
    for line, result in zip(axes.lines, evaluation.plans, strict=True):
        assert list(line.get_ydata()) == [part.kl_nats for part in result.by_position]
        assert list(line.get_xdata()) == [0.5, 1.5, 2.5, 3.5, 4.5]  # between the numbers of where stretches end


@pytest.mark.parametrize("name", PICTURES)
def test_colours_are_told_apart_by_all_eyes(name: str) -> None:
    figure = drawn(name)
    seen = {to_hex(line.get_color()) for axes in figure.axes for line in axes.lines}
    seen |= {to_hex(bar.get_facecolor()) for axes in figure.axes for bar in axes.patches}
    coloured = {colour for colour in seen if len({colour[1:3], colour[3:5], colour[5:7]}) > 1}
    assert coloured <= OKABE_ITO
    if name == "losses":
        assert {mesh.get_cmap().name for axes in figure.axes[:2] for mesh in axes.collections} == {"cividis"}
    else:
        assert coloured


@pytest.mark.parametrize("name", PICTURES)
def test_the_same_record_gives_the_same_bytes_whatever_the_settings_of_matplotlib(name: str, tmp_path: Path) -> None:
    def saved() -> list[bytes]:
        figure = PICTURES[name](4, (1,), Page(dpi=80))
        return [save_figure(figure, tmp_path / f"picture.{kind}").read_bytes() for kind in ("png", "svg")]

    first = saved()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": "another"}):
        assert saved() == first
    assert matplotlib.rcParams["svg.hashsalt"] != "kvprof"


@pytest.mark.parametrize("name", PICTURES)
def test_an_svg_is_xml_whose_text_is_text(name: str, tmp_path: Path) -> None:
    figure = drawn(name)
    path = save_figure(figure, tmp_path / "picture.svg")
    root = ElementTree.parse(path).getroot()
    written = " ".join("".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text"))
    for label in (line for axes in figure.axes for line in axes.get_xlabel().split("\n")):
        assert label in written
    assert b"date" not in path.read_bytes()
    width, height = figure.get_size_inches()
    assert root.attrib["width"] == f"{72 * width:g}pt"
    assert root.attrib["height"] == f"{72 * height:g}pt"


def test_a_model_may_be_called_anything(tmp_path: Path) -> None:
    scores = record_factories.norms(3)
    named = scores.model_copy(update={"model": scores.model.model_copy(update={"id": "a$b$ <&> \x07 " + "x" * 200})})
    path = save_figure(norms_figure(named), tmp_path / "n.svg")
    assert "a$b$ &lt;&amp;&gt; \N{REPLACEMENT CHARACTER} xxx" in path.read_text(encoding="utf-8")
    ElementTree.parse(path)


def test_a_record_with_none_of_its_numbers_is_not_drawn() -> None:
    empty = Scores.from_json({"schema": "kvprof.scores/1", "layers": [{"layer": 0, "key": {}, "value": {}}]}, "s")
    for draw in (norms_figure, gradients_figure, losses_figure):
        with pytest.raises(NothingToDraw):
            draw(empty)
    record = record_factories.spectra(1)
    flat = record.layers[0].key.model_copy(update=dict.fromkeys(("mean", "low", "high"), (0.0,)))
    layer = record.layers[0].model_copy(update={"key": flat, "value": flat})
    with pytest.raises(NothingToDraw, match="every singular value is zero"):
        spectra_figure(record.model_copy(update={"layers": (layer,)}))
