"""`kvprof plot`: pictures by name, by model, by file; what is missing names the command that makes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import record_factories
from benchmarked import benchmark
from test_commands import run

from kvprof.report.plots.catalogue import PICTURES

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """The output folder of a small model, with every file but audit.json and benchmark.json."""
    folder = Path("outputs/handmade")
    for name, document in record_factories.folder_of(4, (1,)).items():
        document.save(folder / name)
    return folder


def drawn(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "plots").iterdir())


def test_with_no_name_all_is_drawn_whose_files_are_there(folder: Path) -> None:
    result = run("plot")
    assert result.exit_code == 0, result.output
    names = [
        "frontier.png",
        "gradients.png",
        "losses.png",
        "norms.png",
        "plan-2.50.png",
        "positions.png",
        "spectra.png",
    ]
    assert drawn(folder) == names
    for name in names:
        assert (folder / "plots" / name).read_bytes().startswith(PNG)
        assert f"written to {folder / 'plots' / name}" in result.output


def test_a_name_draws_that_picture_alone_as_svg_where_asked_for(folder: Path) -> None:
    assert run("plot", "norms", "--format", "svg").exit_code == 0
    assert drawn(folder) == ["norms.svg"]
    assert (folder / "plots" / "norms.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_pictures_of_a_folder_go_into_it_wherever_it_is(folder: Path) -> None:
    elsewhere = Path("elsewhere").absolute()
    folder.rename(elsewhere)
    assert run("plot", "norms", "--model", str(elsewhere)).exit_code == 0
    assert drawn(elsewhere) == ["norms.png"]
    assert not folder.exists()


def test_every_plan_of_the_folder_is_drawn_and_an_export_of_one_is_not(folder: Path) -> None:
    (folder / "plan-2.50.json").rename(folder / "plan-kl-0.01.json")
    record_factories.plan(4, seed=2).save(folder / "plan-3.00.json")
    (folder / "plan-3.00.hf_quant_config.json").write_text('{"quantization": {}}')
    assert run("plot", "plan").exit_code == 0
    assert drawn(folder) == ["plan-3.00.png", "plan-kl-0.01.png"]


@pytest.mark.parametrize("name", PICTURES)
def test_a_missing_file_names_the_command_that_makes_it(name: str, folder: Path) -> None:
    picture = PICTURES[name]
    for path in folder.glob(picture.file):
        path.unlink()
    result = run("plot", name)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert f"there is no {folder / picture.file}, which the picture `{name}` shows" in said
    assert "Run `kvprof " in said
    assert not (folder / "plots").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["losess"], "no picture is called 'losess', and no file: did you mean 'losses'?"),
        (["handmade"], "A model is named with --model handmade"),
        (["norms", "--format", "pdf"], "unknown --format 'pdf': choose from png, svg"),
        (["norms", "--format", "svg", "--dpi", "90"], "an SVG has no pixels"),
        (["norms", "--layers", "1"], "--layers chooses the panels of `spectra`"),
        (["spectra", "--layers", "9"], "no spectrum of layer 9; of layers 0-3"),
        (["--out", "one.png"], "--out one.png is one file, but there are 7 pictures"),
        (["norms", "--format", "png", "--out", "one.svg"], "--out one.svg ends in .svg"),
        (["outputs/handmade/norms.json", "--model", "handmade"], "leave out one of them"),
        (["outputs/handmade"], "name it with --model outputs/handmade"),
        (["norms", "--width", "1"], "or equal to 3"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(words: list[str], said: str, folder: Path) -> None:
    result = run("plot", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (folder / "plots").exists()


def test_a_model_is_found_by_its_id_or_by_its_folder(folder: Path) -> None:
    record_factories.norms(2).save("outputs/org--other/norms.json")  # the newest
    assert run("plot", "norms").exit_code == 0
    assert drawn(Path("outputs/org--other")) == ["norms.png"]
    assert run("plot", "norms", "--model", "org/other", "--format", "svg").exit_code == 0
    assert drawn(Path("outputs/org--other")) == ["norms.png", "norms.svg"]
    assert run("plot", "norms", "--model", folder).exit_code == 0
    assert drawn(folder) == ["norms.png"]
    result = run("plot", "spectra", "--model", "org/other")
    assert "Run `kvprof spectra org/other` first" in " ".join(result.output.split())
    result = run("plot", "--model", "handmode")
    assert result.exit_code == 1
    assert "did you mean 'handmade'?" in result.output


def test_nothing_measured_at_all_says_how_to_begin(in_tmp: Path) -> None:
    result = run("plot")
    assert result.exit_code == 1
    assert "there is nothing to draw in outputs/" in result.output
    assert "kvprof norms" in result.output
    assert not Path("outputs").exists()


def test_a_file_is_drawn_as_what_it_is(folder: Path) -> None:
    assert run("plot", folder / "gradients.json", folder / "plan-2.50.json").exit_code == 0
    assert drawn(folder) == ["gradients.png", "losses.png", "plan-2.50.png"]
    assert run("plot", "losses", folder / "gradients.json", "--out", "pictures").exit_code == 0
    assert [path.name for path in Path("pictures").iterdir()] == ["losses.png"]
    result = run("plot", "plan", folder / "gradients.json")
    assert result.exit_code == 1
    assert "none of these files is what `plan` shows" in result.output


def test_the_picture_of_a_file_elsewhere_goes_to_its_models_folder_under_a_name_of_its_own(folder: Path) -> None:
    record_factories.gradients(3).model_copy(update={"source": "divergence"}).save("mine.json")
    assert run("plot", "losses", "mine.json").exit_code == 0
    assert drawn(folder) == ["losses-mine.png"]
    (folder / "gradients.json").rename(folder / "mine.json")
    result = run("plot", "losses", "mine.json", folder / "mine.json")
    assert result.exit_code == 2
    assert "would both be drawn as" in result.output


def test_a_file_is_written_where_out_says(folder: Path) -> None:
    result = run("plot", "plan", "--out", "figures/plan.svg")
    assert result.exit_code == 0
    assert Path("figures/plan.svg").read_bytes().startswith(b"<?xml")
    assert run("plot", "norms", "plan", "--out", "figures").exit_code == 0
    assert {path.name for path in Path("figures").iterdir()} == {"plan.svg", "norms.png", "plan-2.50.png"}
    Path("taken").write_text("a file")
    result = run("plot", "norms", "--out", "taken")
    assert result.exit_code == 1
    assert "cannot write" in result.output


def test_width_and_dpi_are_what_the_picture_has(folder: Path) -> None:
    assert run("plot", "norms", "--width", "3.3", "--dpi", "300").exit_code == 0
    header = (folder / "plots" / "norms.png").read_bytes()[16:20]
    assert int.from_bytes(header, "big") == 990


def test_spectra_of_chosen_layers(folder: Path) -> None:
    assert run("plot", "spectra", "--layers", "0,2-3", "--format", "svg").exit_code == 0
    text = (folder / "plots" / "spectra.svg").read_text(encoding="utf-8")
    assert [f"layer {layer}" in text for layer in range(4)] == [True, False, True, True]


def test_a_frontier_shows_the_rivals_of_the_evaluation_beside_it(folder: Path) -> None:
    assert run("plot", "frontier", "--format", "svg").exit_code == 0
    assert "norm-greedy spectral" in (folder / "plots" / "frontier.svg").read_text(encoding="utf-8")
    assert run("plot", folder / "frontier.json", "--format", "svg").exit_code == 0
    assert "norm-greedy spectral" in (folder / "plots" / "frontier.svg").read_text(encoding="utf-8")


def test_an_evaluation_of_another_model_is_left_out_of_the_frontier_or_refused_where_it_was_named(folder: Path) -> None:
    path = folder / "evaluation.json"
    path.write_text(path.read_text().replace("sha256:one", "sha256:two"))
    result = run("plot", "frontier", "--format", "svg")
    assert result.exit_code == 0
    assert "is of another model" in " ".join(result.output.split())
    assert "norm-greedy" not in (folder / "plots" / "frontier.svg").read_text(encoding="utf-8")
    result = run("plot", "frontier", folder / "frontier.json", path)
    assert result.exit_code == 4
    assert "its fingerprint is sha256:two, not sha256:one" in " ".join(result.output.split())


def test_a_broken_file_is_passed_over_where_nobody_named_it(folder: Path) -> None:
    (folder / "norms.json").write_text('{"schema": "kvprof.scores/1", "layers": []}')
    result = run("plot")
    assert result.exit_code == 0
    assert "passed over outputs/handmade/norms.json: layers is empty" in " ".join(result.output.split())
    assert "norms.png" not in drawn(folder)
    result = run("plot", "norms")
    assert result.exit_code == 1
    assert "layers is empty" in result.output


def test_a_file_without_what_a_picture_shows_says_what_it_lacks(folder: Path) -> None:
    record_factories.norms(3).save(folder / "gradients.json")
    result = run("plot", "losses")
    assert result.exit_code == 1
    assert "gradients.json has no loss_increase" in " ".join(result.output.split())
    assert run("plot").exit_code == 0
    assert not {"losses.png", "gradients.png"} & set(drawn(folder))


def test_what_there_is_nothing_to_draw_of_is_a_remark_or_named_an_error(folder: Path) -> None:
    record = record_factories.frontier()
    points = tuple(point.model_copy(update={"predicted_kl_nats": 0.0}) for point in record.points)
    record.model_copy(update={"points": points}).save(folder / "frontier.json")
    result = run("plot")
    assert result.exit_code == 0
    assert "no picture of outputs/handmade/frontier.json" in " ".join(result.output.split())
    result = run("plot", "frontier")
    assert result.exit_code == 1
    assert "predicted to lose nothing" in result.output


def test_json_names_the_pictures_and_nothing_else(folder: Path) -> None:
    result = run("plot", "norms", "plan", "--json")
    assert result.exit_code == 0
    paths = [str(folder / "plots" / name) for name in ("norms.png", "plan-2.50.png")]
    assert json.loads(result.stdout) == {"paths": paths}


def test_without_matplotlib_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("plot", "norms")
    assert result.exit_code == 1
    assert "pip install 'kvprof-bits[plot]'" in result.output
    assert not (folder / "plots").exists()


def test_no_model_library_is_loaded(folder: Path) -> None:
    program = (
        "import sys\n"
        "from kvprof.cli.app import app_for\n"
        "app_for(['plot'])(['plot', 'norms', 'plan'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert drawn(folder) == ["norms.png", "plan-2.50.png"]


def test_a_folder_with_a_benchmark_alone_is_drawn_too(in_tmp: Path) -> None:
    benchmark().save("outputs/llama-3-8b/benchmark.json")
    assert run("plot").exit_code == 0
    assert drawn(Path("outputs/llama-3-8b")) == ["benchmark.png"]
