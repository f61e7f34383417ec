"""`kvprof report`: which files it reads, where it writes, what it answers, and that it never asks a hub for a model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import report_factories
from folders import save_folder
from test_commands import run

from kvprof.records.replies import Written


def test_it_writes_both_pages_beside_the_files_and_says_where(in_tmp: Path) -> None:
    report_factories.save_all(in_tmp / "outputs" / "handmade")
    result = run("report")
    assert result.exit_code == 0, result.output
    for name in ("report.html", "report.md"):
        assert f"written to outputs/handmade/{name}" in result.output
        assert "The KV cache of handmade" in Path(f"outputs/handmade/{name}").read_text(encoding="utf-8")
    assert "predicted KL divergence: 0.0125 nats a token" in result.output


def test_the_answer_as_json_is_the_paths(in_tmp: Path) -> None:
    report_factories.save_all(in_tmp / "outputs" / "handmade")
    answer = Written.model_validate(json.loads(run("report", "--json", "--out", "made").stdout))
    assert answer.paths == ("made/report.html", "made/report.md")
    assert all(Path(path).is_file() for path in answer.paths)


def test_the_same_files_make_the_same_pages(in_tmp: Path) -> None:
    report_factories.save_all(in_tmp / "outputs" / "handmade")
    run("report", "--out", "a")
    run("report", "--out", "b")
    for name in ("report.html", "report.md"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_out_may_be_a_file_and_the_folder_may_be_named(in_tmp: Path) -> None:
    report_factories.save_all(in_tmp / "measured")
    result = run("report", "measured", "--out", "site/index.html")
    assert result.exit_code == 0, result.output
    assert Path("site/index.html").is_file()
    assert Path("site/index.md").is_file()
    assert not list(Path("measured").glob("report*"))


def test_what_was_measured_into_a_folder_of_its_own_is_found_by_the_same_out(in_tmp: Path) -> None:
    save_folder(in_tmp / "model")
    assert run("norms", "./model", "--out", "mine").exit_code == 0
    result = run("report", "./model", "--out", "mine")
    assert result.exit_code == 0, result.output
    page = Path("mine/report.html").read_text(encoding="utf-8")
    assert "keys are larger in" in page
    assert "kvprof gradients" in page


def test_a_config_on_this_machine_tells_red_flags(in_tmp: Path) -> None:
    save_folder(in_tmp / "model", "gemma3")
    run("norms", "./model")
    result = run("report", "./model")
    assert result.exit_code == 0, result.output
    page = next(Path("outputs").glob("*/report.html")).read_text(encoding="utf-8")
    assert "Red flag key_norm (every layer)" in page
    assert "sliding, window 16 tokens" in page


def test_a_model_that_was_never_measured_has_its_inventory_alone(in_tmp: Path) -> None:
    save_folder(in_tmp / "model")
    result = run("report", "./model")
    assert result.exit_code == 0, result.output
    notes = " ".join(result.output.split())
    for command in ("norms", "spectra", "gradients", "allocate", "frontier", "evaluate", "audit"):
        assert f"kvprof {command}" in notes
    page = next(Path("outputs").glob("*/report.html")).read_text(encoding="utf-8")
    assert "Each token adds" in page


@pytest.mark.demo
def test_with_nothing_measured_the_demo_model_s_inventory_is_reported_as_often_as_it_is_asked_for(in_tmp: Path) -> None:
    for _ in range(2):  # the second time there is a folder, with a report alone
        result = run("report")
        assert result.exit_code == 0, result.output
        assert "a token adds, unquantized: 45.00 KiB" in result.output


def test_each_model_that_could_be_meant_is_named_once(in_tmp: Path) -> None:
    for name in ("demo", "another"):
        Path("outputs", name).mkdir(parents=True)
    result = run("report", "org/nothing-like-it")
    assert result.exit_code == 1
    assert "choose from demo, another\n" in result.output


def test_shapes_come_from_the_files_where_the_config_is_not_here(in_tmp: Path) -> None:
    report_factories.save_all(in_tmp / "outputs" / "handmade")
    run("report", "handmade")
    page = Path("outputs/handmade/report.html").read_text(encoding="utf-8")
    assert "Each token adds 3072 bytes" in page  # 4 layers of 3 heads of 64, K and V, 2 bytes each
    assert "red flags" in page
    assert "are unknown here" in page


def test_named_files_are_the_ones_that_are_shown(in_tmp: Path) -> None:
    report_factories.save_all(in_tmp / "outputs" / "handmade")
    report_factories.plan(solver={"method": "by hand", "predicted_kl_nats": 0.0078125}).save("mine.json")
    report_factories.gradients(source="mine").save("scores.json")
    result = run("report", "--plan", "mine.json", "--scores", "scores.json")
    assert "predicted KL divergence: 0.00781 nats" in result.output
    page = Path("outputs/handmade/report.md").read_text(encoding="utf-8")
    assert "mine.json" in page
    assert "This evaluation is of another plan" in page


def test_what_is_passed_over_is_said_on_the_page_and_beside_it(in_tmp: Path) -> None:
    folder = report_factories.save_all(in_tmp / "outputs" / "handmade")
    other = {"id": "other", "fingerprint": "sha256:two", "num_layers": 4}
    report_factories.norms(model=other).save(folder / "norms.json")
    result = run("report")
    assert "passed over outputs/handmade/norms.json" in " ".join(result.output.split())
    assert "passed over outputs/handmade/norms.json" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_plan_of_another_model_is_refused(in_tmp: Path) -> None:
    report_factories.save_all(in_tmp / "outputs" / "handmade")
    other = {"id": "other", "fingerprint": "sha256:two", "num_layers": 4}
    report_factories.plan(model=other).save("other.json")
    result = run("report", "--scores", "outputs/handmade/gradients.json", "--plan", "other.json")
    assert result.exit_code == 4
    assert "is not of the model that this report is about" in " ".join(result.output.split())
    assert not list(Path().glob("**/report.*"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--plan", "nosuch.json"), 1, "nosuch.json: no such file"),
        (("dmeo",), 1, "did you mean 'demo'?"),
        (("./nowhere",), 1, "nothing is known of './nowhere'"),
        (("--plan", "benchmark.json"), 1, "schema"),
        (("--out", "blocked/in"), 1, "cannot write"),
    ],
)
def test_a_mistake_is_one_message(in_tmp: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    report_factories.save_all(in_tmp / "outputs" / "handmade")
    (in_tmp / "benchmark.json").write_text('{"schema": "kvprof.nothing/1"}')
    (in_tmp / "blocked").write_text("")
    result = run("report", *arguments)
    assert result.exit_code == code
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_model_that_only_files_know_costs_no_torch(in_tmp: Path) -> None:
    report_factories.save_all(in_tmp / "outputs" / "handmade")
    code = """
import sys
sys.argv = ["kvprof", "report"]
from kvprof.__main__ import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
assert not [name for name in ("torch", "transformers") if name in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.demo
def test_the_demo_models_page_says_in_how_many_layers_keys_are_larger(in_tmp: Path) -> None:
    assert run("norms").exit_code == 0
    result = run("report")
    assert result.exit_code == 0, result.output
    page = Path("outputs/demo/report.html").read_text(encoding="utf-8")
    assert "By spectral norm, keys are larger in 29 of 30 layers (all but layer 19)." in page
    assert "46080 bytes (45.00 KiB) in 30 of 30 layers" in page
    assert "No red flags" in page
    assert len(page.encode()) < 3 * 10**6
    assert not re.search(r"https?:", page)


@pytest.mark.parametrize("losses", [{"int2g32": 1e-300, "int3g32": 0}, {"int2g32": 5e-324, "int8g32": 1e308}])
def test_numbers_that_no_logarithmic_scale_holds_are_drawn_at_its_ends(in_tmp: Path, losses: dict[str, float]) -> None:
    layers = [{"layer": n, "key": {"loss_increase": losses}, "value": {"loss_increase": losses}} for n in range(2)]
    Path("outputs/handmade").mkdir(parents=True)
    Path("outputs/handmade/gradients.json").write_text(json.dumps({"schema": "kvprof.scores/1", "layers": layers}))
    for command in ("report", "plot"):
        result = run(command)
        assert result.exit_code == 0, result.output
