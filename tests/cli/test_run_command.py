"""`kvprof run`: recipes carried out, resumed, and done again where something changed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import edit_weights, save_folder, save_text
from test_commands import run

from kvprof import BitPlan, Scores
from kvprof.storage.journal import Journal

RECIPE = """
model = "model"
out = "results"

[text]
data = "text.txt"
sequences = 3
sequence_length = 16

[norms]

[gradients]
formats = "int2g8,int4g8,int8g8"
sink_tokens = 1
recent_tokens = 2

[calibrate]

[[plans]]
budgets = [6, 7]

[[rivals]]
rule = "kvmix"

[evaluate]
data = "held-out.txt"
sequences = 2
sequence_length = 16
rivals = false
"""
STEPS = ["norms", "gradients", "calibrate", "allocate", "allocate", "allocate", "evaluate"]


@pytest.fixture
def recipe(in_tmp: Path) -> Path:
    """A recipe with all that it reads, in the working folder."""
    save_folder(in_tmp / "model")
    save_text(in_tmp / "text.txt", rows=9)
    save_text(in_tmp / "held-out.txt", rows=4)
    path = in_tmp / "mine.toml"
    path.write_text(RECIPE)
    return path


def statuses(*arguments: str) -> list[str]:
    """Run a recipe to its end; return what became of each step."""
    result = run("run", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return [step["status"] for step in json.loads(result.stdout)["steps"]]


def commands_done(*arguments: str) -> list[str]:
    """Run a recipe to its end; return the commands that were not skipped, plans by their files."""
    result = run("run", *arguments, "--json")
    assert result.exit_code == 0, result.output
    steps = [step for step in json.loads(result.stdout)["steps"] if step["status"] == "done"]
    words = [shlex.split(step["command"]) for step in steps]
    return [Path(line[-1]).stem if line[1] == "allocate" else line[1] for line in words]


def test_a_recipe_runs_to_its_end_and_a_second_time_skips_every_step(recipe: Path) -> None:
    result = run("run", "mine.toml")
    assert result.exit_code == 0, result.output
    assert "[1/7] kvprof norms model --out results" in result.output
    assert "recipe mine on" in result.output
    assert BitPlan.load("results/plan-6.00.json").budget is not None
    assert json.loads(Path("results/evaluation.json").read_text())["plans"][2]["name"] == "plan-kvmix"
    before = {path: path.read_bytes() for path in Path("results").glob("*.json")}
    assert statuses("mine.toml") == ["skipped"] * 7
    assert {path: path.read_bytes() for path in Path("results").glob("*.json")} == before
    assert "0 of them skipped" not in run("run", "mine.toml", "--dry-run").output


def test_a_step_does_what_its_line_would(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = run("run", "mine.toml", "--dry-run", "--json")
    lines = [step["command"] for step in json.loads(planned.stdout)["steps"]]
    assert [shlex.split(line)[1] for line in lines] == STEPS
    for line in lines:
        monkeypatch.setattr("sys.argv", shlex.split(line))  # plans say what was typed
        assert run(*shlex.split(line)[1:]).exit_code == 0
    Path("results").rename("typed")
    assert run("run", "mine.toml").exit_code == 0
    assert BitPlan.load("results/plan-6.00.json").provenance.command in lines
    for path in Path("typed").glob("*.json"):
        assert Path("results", path.name).read_text() == path.read_text()


def test_a_dry_run_writes_nothing_and_tells_what_is_to_do(recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    result = run("run", "mine.toml", "--dry-run")
    assert result.exit_code == 0
    assert result.output.count("to do: not done yet") == 7
    assert sorted(recipe.parent.rglob("*")) == before
    assert run("run", "mine.toml").exit_code == 0
    Path("results/gradients.json").write_text("{}")
    said = run("run", "mine.toml", "--dry-run").output
    assert "skipped: its output is there" in said
    assert "to do: results/gradients.json is no longer what it wrote" in said
    assert "perhaps: only if step 2 writes another gradients.json" in said


def edit_recipe(old: str, new: str) -> Callable[[], Any]:
    return lambda: Path("mine.toml").write_text(RECIPE.replace(old, new))


def negate_an_mlp(state: dict[str, torch.Tensor]) -> None:
    """Change what neither norms nor signs of W_k and W_v see."""
    state["model.layers.0.mlp.up_proj.weight"].neg_()


ALL = ["norms", "gradients", "calibrate", "plan-6.00", "plan-7.00", "plan-kvmix", "evaluate"]


@pytest.mark.parametrize(
    ("change", "done"),
    [
        (edit_recipe("budgets = [6, 7]", "budgets = [6, 7.5]"), ["plan-7.50", "evaluate"]),
        (edit_recipe("sequences = 3", "sequences = 4"), ALL[1:]),
        (edit_recipe("sequences = 2", "sequences = 1"), ["evaluate"]),
        (edit_recipe("model =", "# nothing that matters\nmodel ="), []),
        (lambda: save_text(Path("text.txt"), rows=10), ALL[1:]),
        (lambda: save_text(Path("held-out.txt"), rows=5), ["evaluate"]),
        (lambda: Path("text.txt").touch(), []),
        (lambda: Path("results/gradients.json").touch(), []),
        (lambda: Path("results/evaluation.json").unlink(), ["evaluate"]),
        (lambda: Path("results/plan-6.00.json").write_text("{}"), ["plan-6.00"]),
        # Measured anew they are the same to the byte, and what is made of them need not be.
        (lambda: Path("results/gradients.json").unlink(), ["gradients", "calibrate"]),
        (lambda: Path("results/history.json").unlink(), ALL),
        (lambda: Path("results/history.json").write_text("[]"), ALL),
        (lambda: edit_weights(Path("model"), negate_an_mlp), ["norms", *ALL[1:]]),
        (lambda: Path("results").rename("moved"), ALL),
    ],
)
def test_what_depends_on_a_change_is_done_again_and_nothing_else(
    recipe: Path, change: Callable[[], Any], done: list[str]
) -> None:
    assert commands_done("mine.toml") == ALL
    change()
    assert commands_done("mine.toml") == done
    assert commands_done("mine.toml") == []


def test_another_version_of_kvprof_does_all_of_it_again(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands_done("mine.toml") == ALL
    monkeypatch.setattr("kvprof.recipes.done.__version__", "0.0.9")
    assert "it was done by kvprof 0.1.0" in run("run", "mine.toml", "--dry-run").output
    assert commands_done("mine.toml") == ALL


def test_results_that_were_moved_are_found_there(recipe: Path) -> None:
    assert commands_done("mine.toml") == ALL
    Path("results").rename("moved")
    assert commands_done("mine.toml", "--out", "moved") == []


def test_recipes_with_steps_in_common_share_them(recipe: Path) -> None:
    assert commands_done("mine.toml") == ALL
    Path("other.toml").write_text(
        'model = "model"\nout = "results"\n[norms]\n[[plans]]\nbudgets = 3\nmetric = "spectral_norm"\n'
    )
    assert commands_done("other.toml") == ["plan-spectral-3.00"]
    assert commands_done("mine.toml") == []


def interrupt_after(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come once a journal has so many pieces."""
    add = Journal.add

    def add_and_stop(journal: Journal, key: str, result: object) -> None:
        add(journal, key, result)
        if journal.path.name == "gradients.journal" and len(journal.done) == pieces:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_and_stop)


def test_a_run_that_ctrl_c_stopped_goes_on_where_it_was(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        result = run("run", "mine.toml")
    assert result.exit_code == 130
    assert "The same command goes on" in result.output
    assert "failed" not in result.output
    assert len(Path("results/gradients.journal").read_text().splitlines()) == 3
    assert "begun, and goes on where it was stopped" in run("run", "mine.toml", "--dry-run").output
    result = run("run", "mine.toml")
    assert result.exit_code == 0, result.output
    assert "skipped" in result.output.partition("[2/7]")[0]
    assert "went on with a stopped run: 2 of 3 sequences" in result.output
    assert not Path("results/gradients.journal").exists()


@pytest.mark.parametrize("stops", [1, 2])
def test_other_settings_begin_anew_what_was_stopped(recipe: Path, monkeypatch: pytest.MonkeyPatch, stops: int) -> None:
    for pieces in range(1, stops + 1):
        with monkeypatch.context() as patch:
            interrupt_after(pieces, patch)
            assert run("run", "mine.toml").exit_code == 130
    recipe.write_text(RECIPE.replace("sequences = 3", "sequences = 2"))
    result = run("run", "mine.toml")
    assert result.exit_code == 0, result.output
    calibration = Scores.load("results/gradients.json").calibration
    assert calibration is not None
    assert calibration.sequences == 2


def test_a_journal_that_no_recipe_began_is_left_alone(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        stopped = ("gradients", "model", "--data", "text.txt", "--sequence-length", "8", "--out", "results")
        assert run(*stopped).exit_code == 130
    result = run("run", "mine.toml")
    assert result.exit_code == 4
    assert "is a stopped run with another" in result.output
    assert Path("results/gradients.journal").exists()
    assert statuses("mine.toml", "--restart") == ["done"] * 7


def test_restart_does_every_step_again(recipe: Path) -> None:
    assert commands_done("mine.toml") == ALL
    assert commands_done("mine.toml", "--restart") == ALL


def test_a_step_that_fails_stops_the_run_with_its_own_exit_code(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("[6, 7]", "[0.5, 7]"))
    result = run("run", "mine.toml")
    assert result.exit_code == 3
    said = " ".join(result.output.split())
    assert "below what these formats can reach" in said
    assert "step 4 of 7 failed: kvprof allocate --budget 0.5" in said
    assert "give the same command again to go on" in said
    recipe.write_text(RECIPE)
    assert commands_done("mine.toml") == ALL[3:]


def test_a_check_that_is_not_met_stops_the_run_with_five(recipe: Path) -> None:
    # Six stored bits buy int2g8 everywhere, and so the rival is the same plan.
    same = RECIPE.replace('rule = "kvmix"', 'rule = "uniform"\nformats = "int2g8"').replace("[6, 7]", "6")
    recipe.write_text(f"{same}check = true\n")
    result = run("run", "mine.toml")
    assert result.exit_code == 5
    assert "is no better than plan-uniform" in result.output
    assert "step 6 of 6 failed" in result.output
    recipe.write_text(same)
    assert commands_done("mine.toml") == ["evaluate"]


def test_a_recipe_in_another_folder_finds_what_lies_beside_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands_done("mine.toml") == ALL
    elsewhere = recipe.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert commands_done("../mine.toml") == []
    assert commands_done("../mine.toml", "--out", "here", "--model", "../model") == ALL
    assert sorted(path.name for path in elsewhere.iterdir()) == ["here"]


def test_another_model_and_folder_can_be_named(recipe: Path) -> None:
    save_folder(Path("other"), "llama-mha")
    assert commands_done("mine.toml", "--model", "./other", "--out", "there") == ALL
    plan = BitPlan.load("there/plan-6.00.json")
    assert plan.model.id == str(Path("other").resolve())
    assert run("validate", "there/plan-6.00.json", "./model").exit_code == 4
    assert not Path("results").exists()


def test_a_folder_called_demo_is_not_the_demo_model(recipe: Path) -> None:
    Path("model").rename("demo")
    assert commands_done("mine.toml", "--model", "./demo") == ALL
    assert BitPlan.load("results/plan-6.00.json").model.id == str(Path("demo").resolve())


def test_pictures_are_in_the_folder_that_was_named_and_drawn_again_when_gone(recipe: Path) -> None:
    Path("drawing.toml").write_text('model = "model"\nout = "results"\n[norms]\n[plot]\nformat = "svg"\n')
    assert commands_done("drawing.toml") == ["norms", "plot"]
    picture = Path("results/plots/norms.svg")
    assert picture.is_file()
    assert commands_done("drawing.toml") == []
    picture.unlink()
    assert commands_done("drawing.toml") == ["plot"]
    assert picture.is_file()
    assert not Path("outputs").exists()


def test_without_a_folder_results_go_where_the_model_s_others_are(recipe: Path) -> None:
    recipe.write_text('model = "model"\n[norms]\n')
    assert run("run", "mine.toml").exit_code == 0
    assert run("norms", "./model").exit_code == 0
    assert len(list(Path("outputs").iterdir())) == 1


def test_two_runs_into_one_folder_are_one_too_many(recipe: Path) -> None:
    from kvprof.recipes.done import Past

    with Past(Path("results")):
        result = run("run", "mine.toml")
    assert result.exit_code == 1
    assert "another kvprof runs a recipe in results" in result.output
    assert run("run", "mine.toml").exit_code == 0


def test_json_is_one_record_and_quiet_is_nothing(recipe: Path) -> None:
    text = RECIPE.replace("[[rivals]]", '[[targets]]\nruntime = "transformers"\nbudgets = 6\n[[rivals]]')
    recipe.write_text(text.replace("sequences = 3", "sequences = 2"))
    answer = json.loads(run("run", "mine.toml", "--json").stdout)
    assert answer["folder"] == "results"
    made = [path for step in answer["steps"] for path in step["outputs"]]
    assert "results/transformers/plan-transformers-6.00.json" in made
    assert all(Path(path).is_file() for path in made)
    assert run("run", "mine.toml", "--quiet").output == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("quikstart",), 2, ["'quikstart'", "did you mean 'quickstart'?", "--list"]),
        (("none.toml",), 1, ["none.toml: no such file"]),
        (("./none",), 1, ["none: no such file"]),
        (("model",), 1, ["model is a folder"]),
        (("mine.toml", "--list"), 2, ["--list"]),
        (("--model", "demo"), 2, ["name a recipe"]),
        (("mine.toml", "--model", "./mdel"), 1, ["mdel", "Did you mean"]),
        (("mine.toml", "--out", "text.txt/below"), 1, ["cannot write"]),
        (("wrong.toml",), 1, ["wrong.toml", "did you mean 'norms'?"]),
        (("late.toml",), 1, ["late.toml: plans[0].rule", "did you mean 'kvmix'?"]),
    ],
)
def test_a_bad_request_is_one_message_and_its_exit_code(
    recipe: Path, arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    Path("wrong.toml").write_text("[norm]\n")
    Path("late.toml").write_text('model = "model"\n[[plans]]\nrule = "kvmx"\n')
    result = run("run", *arguments)
    assert result.exit_code == code, result.output
    for word in words:
        assert word in " ".join(result.output.split())
    assert not Path("results").exists()


def test_the_shipped_recipes_are_listed_with_a_line_each(in_tmp: Path) -> None:
    listed = run("run", "--list")
    assert listed.output == run("run").output
    names = [line.split()[0] for line in listed.output.splitlines()]
    assert names == sorted(names)
    assert {"quickstart", "norm-aware", "kvmix", "predictive", "long-context", "serving", "hybrid"} == set(names)
    assert [entry["name"] for entry in json.loads(run("run", "--json").stdout)["recipes"]] == names


@pytest.mark.parametrize("out", ["../escaped", "/escaped", "link/results", "a/../../escaped"])
def test_a_recipe_writes_nowhere_but_in_its_folder(out: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = in_tmp / "recipe", in_tmp / "elsewhere"
    for folder in (home, elsewhere, in_tmp / "here"):
        folder.mkdir()
    (home / "link").symlink_to(elsewhere)
    save_folder(home / "model")
    (home / "mine.toml").write_text(f'model = "model"\nout = "{out}"\n[norms]\n')
    monkeypatch.chdir(in_tmp / "here")
    result = run("run", "../recipe/mine.toml")
    assert result.exit_code == 1
    assert f"out is '{out}', which leads out of the recipe's folder." in " ".join(result.output.split())
    assert sorted(path.name for path in in_tmp.iterdir()) == ["elsewhere", "here", "recipe"]
    assert list(elsewhere.iterdir()) == []
    assert run("run", "../recipe/mine.toml", "--out", "../elsewhere").exit_code == 0  # as the user says
    assert (elsewhere / "norms.json").exists()


def test_a_plan_has_no_name_that_is_a_device(in_tmp: Path) -> None:
    save_folder(in_tmp / "model")
    Path("mine.toml").write_text(
        'model = "model"\n[norms]\n[[plans]]\nbudgets = 3\nmetric = "spectral_norm"\nname = "CON"\n'
    )
    result = run("run", "mine.toml")
    assert result.exit_code == 1
    assert "'CON' is a device on Windows" in result.output
