"""A benchmark printed fits 80 columns, and drawn says what every line is; what has no time has a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmarked import benchmark, benchmark_json, refused

from kvprof.errors import OutputError
from kvprof.records.benchmark import Benchmark
from kvprof.report.benchmarks import case_verdict, reasons, show_benchmark, show_benchmark_picture
from kvprof.report.plots.benchmark import benchmark_figure
from kvprof.report.plots.style import save_figure


def test_tables_fit_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show_benchmark(benchmark(contexts=(4096, 131072), batches=(1, 64)))
    printed = capsys.readouterr().out
    tables = [line for line in printed.splitlines() if line.startswith(" ")]
    assert len(tables) > 20
    assert max(map(len, tables)) <= 80
    assert "\x1b" not in printed


def test_what_is_printed_is_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    show_benchmark(benchmark())
    captured = capsys.readouterr()
    printed = " ".join(captured.out.split())
    for words in (
        "plan-4.00 on llama-3-8b (bfloat16, random weights), kernels: triton",
        "cuda: NVIDIA H100 80GB HBM3; 80.00 GiB of memory, cache 50.00 MiB, compute capability 9.0",
        "a copy within memory: 10.0 GB/s read and written",
        "16 / 4 = 4.00 times fewer bytes",
        "decode attention at 4096 tokens, 1 sequence ",
        "PlanCache, triton bfloat16 4.10 3.7-4.9 3.91 1.00 10 -",
        "SDPA flash bfloat16 12.3 11-15 15.6 1.33 13 3.00",
        "3.00 times as fast as SDPA flash (bfloat16); 3.50 times fewer bytes than at 16 bits",
        "adding a token, packing and all: 0.010 ms, 1.0% of a step of the whole model",
        "4096 x 8: 1.50 times the tokens a second of DynamicCache",
        "the largest batch of 32768 tokens in 24.00 GiB",
        "PlanCache: 4.00 times as many sequences, 2.40 times the tokens a second",
    ):
        assert words in printed, words
    said = " ".join(captured.err.split())
    assert "no time of FlashAttention in bfloat16: the package flash-attn is not installed" in said
    assert said.count("flash-attn") == 1  # of four cases
    assert "a remark" in said


def test_a_plan_that_is_slower_is_said_to_be() -> None:
    case = benchmark().cases[0]
    slower = case.full[0].model_copy(update={"timing": case.planned.timing})
    turned = case.model_copy(update={"planned": case.full[1], "full": (slower,), "speedup": 1 / 3})
    assert case_verdict(turned).startswith("3.00 times slower than SDPA")
    assert case_verdict(case.model_copy(update={"full": (), "speedup": None})) is None


def test_a_reason_of_some_cases_names_them() -> None:
    document = benchmark_json(contexts=(10, 20, 30), batches=(1, 2, 3))
    for case in document["cases"]:
        case["full"] = case["full"][:2]
        if case["batch"] > 1:
            case |= {"planned": refused("PlanCache, triton", 7), "speedup": None}
    document["largest_batch"]["full"] |= {"lowered_from": 4}
    said = reasons(Benchmark.from_json(document, "b.json"))
    assert said == [
        "no time of PlanCache, triton in bfloat16 at 10 x 2, 10 x 3, 20 x 2, 20 x 3 and 2 more: "
        "the package flash-attn is not installed",
        "DynamicCache: 4 sequences fit by count, 3 on the device",
    ]


@pytest.mark.parametrize("batches", [(1,), (1, 8), (1, 8, 64)])
def test_a_picture_has_a_panel_a_batch_and_every_line_in_its_legend(tmp_path: Path, batches: tuple[int, ...]) -> None:
    figure = benchmark_figure(benchmark(contexts=(4096, 32768, 131072), batches=batches))
    path = save_figure(figure, tmp_path / "plots" / "b.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(figure.axes) == len(batches)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "PlanCache, triton",
        "SDPA, bfloat16",
        "SDPA flash, bfloat16",
        "limit: 16 bits copied",
        "limit: PlanCache copied",
    ]
    box = legend.get_window_extent()
    for axes in figure.axes:
        assert "tokens" in axes.get_xlabel()
        assert "ms" in axes.get_ylabel()
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert not box.overlaps(axes.get_window_extent())
    for text in (figure._suptitle, legend):
        extent = text.get_window_extent()
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width
        assert 0 <= extent.y0 < extent.y1 <= figure.bbox.height
    assert not box.overlaps(figure._suptitle.get_window_extent())


def test_the_limit_is_the_bytes_at_the_speed_of_the_copy() -> None:
    (axes,) = benchmark_figure(benchmark(batches=(1,))).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines["limit: PlanCache copied"]) == pytest.approx(
        [1e3 * 1000 * tokens / 1e10 for tokens in (4096, 32768)]
    )
    assert list(lines["limit: 16 bits copied"]) == pytest.approx(
        [4e3 * 1000 * tokens / 1e10 for tokens in (4096, 32768)]
    )


def test_without_matplotlib_or_times_there_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "benchmark.png"
    old.write_text("of another run")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        show_benchmark_picture(benchmark(), tmp_path)
    assert "pip install 'kvprof-bits[plot]'" in capsys.readouterr().err
    assert not old.exists()
    document = benchmark_json(contexts=(10,), batches=(1,))
    document["cases"][0] |= {"planned": refused("PlanCache, triton", 7), "speedup": None}
    show_benchmark_picture(Benchmark.from_json(document, "b.json"), tmp_path)
    assert "no attention was timed" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(OutputError):
        save_figure(benchmark_figure(benchmark()), tmp_path / "plots" / "b.png")
