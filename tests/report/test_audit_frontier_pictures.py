"""Are pictures written whole, of the right size, with every label readable: inside the frame, none on another?"""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, BboxBase
from record_factories import audit

from kvprof.errors import OutputError
from kvprof.records.frontier import Frontier, FrontierPoint
from kvprof.report.audits import show_pictures
from kvprof.report.plots.audit import audit_figure
from kvprof.report.plots.frontier import frontier_figure
from kvprof.report.plots.notes import write_beside
from kvprof.report.plots.style import MissingMatplotlib, NothingToDraw, save_figure


def frontier(numbers: int = 40, stderr: float | None = 0.3, knees: tuple[int, ...] = (5, 12, 14)) -> Frontier:
    points = []
    for index in range(numbers):
        bits = 2 + 6 * index / max(1, numbers - 1)
        kl = 0.2 * math.exp(-1.5 * (bits - 2))
        points.append(
            FrontierPoint(
                budget=bits, nominal_bits=bits, stored_bits=bits, compression=16 / bits, predicted_kl_nats=kl,
                predicted_kl_stderr_nats=None if stderr is None else stderr * kl, plan_digest=f"p{index}", optimal=True,
                knee=index in knees,
            )
        )  # fmt: skip
    window = {"sink_tokens": 4, "recent_tokens": 128}
    return Frontier(metric="loss_increase", unit="stored", window=window, points=tuple(points))


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


KEYS_AND_VALUES = (("key", "int2g64", 2), ("value", "int2g64", 2))


@pytest.mark.parametrize("formats", [KEYS_AND_VALUES, (*KEYS_AND_VALUES, ("value", "rot2", 2), ("key", "int4g64", 4))])
def test_an_audit_is_drawn_with_no_text_on_another(tmp_path: Path, formats: Any) -> None:
    figure = audit_figure(audit(formats, spread=1.2), "loss_increase")
    path = save_figure(figure, tmp_path / "plots" / "audit.png")
    width, height = png_size(path)
    assert 700 <= height <= 900
    panels = len({bits for _, _, bits in formats})
    assert 600 * panels <= width <= 750 * panels
    assert len(figure.axes) == panels
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert "nats per token" in axes.get_xlabel()
        assert "nats per token" in axes.get_ylabel()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) >= 3
        frame = axes.get_window_extent()
        for number, box in enumerate(boxes):
            assert frame.x0 <= box.x0
            assert box.x1 <= frame.x1
            assert not any(box.overlaps(other) for other in boxes[:number])
            assert not box.overlaps(axes.get_legend().get_window_extent())
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title, figure._suptitle):
            box = label.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= width
            assert 0 <= box.y0 < box.y1 <= height


def test_points_beyond_a_factor_of_two_are_named_by_tensor_and_layer() -> None:
    near = audit(KEYS_AND_VALUES, layers=4, spread=0.0)
    far = near.points[2].model_copy(update={"scores": {"loss_increase": 9 * near.points[2].measured_nats}})
    changed = near.model_copy(update={"points": (*near.points[:2], far, *near.points[3:])})
    figure = audit_figure(changed, "loss_increase")
    assert [text.get_text() for text in figure.axes[0].texts] == ["K2"]


def test_zero_has_no_place_on_a_logarithmic_axis() -> None:
    some = audit(KEYS_AND_VALUES, layers=3)
    zero = some.points[0].model_copy(update={"measured_nats": 0.0})
    assert audit_figure(some.model_copy(update={"points": (zero, *some.points[1:])}), "loss_increase").axes
    with pytest.raises(NothingToDraw, match="nothing to draw"):
        audit_figure(some.model_copy(update={"points": (zero,)}), "loss_increase")
    with pytest.raises(NothingToDraw, match="nothing to draw"):
        audit_figure(some, "another")


def test_a_single_point_is_a_picture_too(tmp_path: Path) -> None:
    assert save_figure(
        audit_figure(audit((("key", "rot2", 2),), layers=1), "loss_increase"), tmp_path / "a.png"
    ).exists()
    assert save_figure(frontier_figure(frontier(1, knees=())), tmp_path / "b.png").exists()


@pytest.mark.parametrize("stderr", [None, 0.3, 2.0])
def test_a_frontier_is_drawn_with_its_knees_marked(tmp_path: Path, stderr: float | None) -> None:
    drawn = frontier(stderr=stderr)
    figure = frontier_figure(drawn)
    width, height = png_size(save_figure(figure, tmp_path / "frontier.png"))
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    figure.draw_without_rendering()
    assert "stored bits" in axes.get_xlabel()
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == sorted(f"{knee.stored_bits:.2f} bits: {knee.predicted_kl_nats:.2g}" for knee in drawn.knees)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(box.overlaps(other) for number, box in enumerate(boxes) for other in boxes[:number])
    assert all(0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height for box in boxes)


def test_a_frontier_that_loses_nothing_is_not_drawn() -> None:
    lossless = frontier(3, None, ())
    points = tuple(point.model_copy(update={"predicted_kl_nats": 0.0}) for point in lossless.points)
    with pytest.raises(NothingToDraw, match="lose nothing"):
        frontier_figure(lossless.model_copy(update={"points": points}))


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingMatplotlib, match="kvprof-bits"):
        frontier_figure(frontier())
    spread = {"label": "loss_increase", "group": "2 bits", "bits": 2, "tensors": 3, "median": 1.0, "low": 1.0,
              "high": 1.0, "worst": 1.0, "worst_layer": 0, "worst_tensor": "key"}  # fmt: skip
    show_pictures(audit(KEYS_AND_VALUES, ratios=(spread,)), tmp_path)
    assert "no picture: drawing a picture needs the package matplotlib" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        save_figure(frontier_figure(frontier()), tmp_path / "plots" / "frontier.png")


def test_a_note_goes_to_the_first_place_that_is_free_or_is_left_out() -> None:
    figure = Figure(figsize=(4, 4), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 288), ylim=(0, 288))  # so that data, points and pixels are the same
    beside, above = (10, 0), (0, 30)

    def placed(at: tuple[float, float], *boxes: tuple[float, float, float, float]) -> tuple[float, float] | None:
        before = len(axes.texts)
        taken: list[BboxBase] = [Bbox.from_extents(*box) for box in boxes]
        write_beside(axes, at, "note", "black", (beside, above), taken)
        assert len(taken) - len(boxes) == len(axes.texts) - before
        return axes.texts[-1].xyann if len(axes.texts) > before else None

    right, up = placed((100, 100)), placed((100, 100), (112, 95, 113, 105))
    assert right is not None
    assert right[0] > 10
    assert right[1] == pytest.approx(0)
    assert up == (pytest.approx(0), pytest.approx(30))
    assert placed((270, 100)) == up  # beside it there is no room within the panel
    assert placed((100, 100), (0, 0, 288, 288)) is None
