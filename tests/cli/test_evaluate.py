"""`kvprof evaluate` as a user types it: rivals from scores, --against, --check, and the file that show prints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from folders import save_folder, save_text
from tiny import tiny_model
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.records.evaluation import Evaluation
from kvprof.records.plan import BitPlan

TEXT = ("--data", "text.txt", "--pack", "--sequences", "2", "--sequence-length", "40", "--device", "cpu")


def run(*arguments: str | Path) -> Result:
    """Run a command in this process; an exception that is no exit is a failure."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def allocate(bits_key: int, bits_value: int, out: str, *more: str) -> None:
    """Write a uniform plan with a small window, so that codes are read."""
    window = ("--recent-tokens", "4", "--sink-tokens", "1", "--group-size", "4")
    bits = ("--rule", "uniform", "--bits-key", str(bits_key), "--bits-value", str(bits_value))
    result = run(
        "allocate", *bits, *window, *more, "--scores", next(Path("outputs").glob("*/norms.json")), "--out", out
    )
    assert result.exit_code == 0, result.output


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """A model with norms and two plans, the one much better than the other."""
    save_folder(in_tmp / "model")
    save_text(in_tmp / "text.txt", rows=60)
    assert run("norms", "./model").exit_code == 0
    allocate(8, 8, "fine.json")
    allocate(1, 1, "coarse.json")
    return in_tmp


def only_evaluation() -> Evaluation:
    return Evaluation.load(next(Path("outputs").glob("*/evaluation.json")))


def test_a_plan_is_measured_beside_rivals_and_show_prints_the_same(folder: Path) -> None:
    allocate(3, 2, "plan.json", "--pin", "key:0=4")
    result = run("evaluate", "plan.json", *TEXT)
    assert result.exit_code == 0, result.output
    found = only_evaluation()
    roles = [entry.role for entry in found.plans]
    assert roles[0] == "plan"
    assert roles.count("rival") >= 4
    assert "the baselines need gradients, measured now" in result.output
    assert "need norms" not in result.output
    assert sorted(path.name for path in next(Path("outputs").iterdir()).iterdir()) == [
        "evaluation.json",
        "gradients.json",
        "norms.json",
    ]
    shown = run("show", next(Path("outputs").glob("*/evaluation.json"))).output
    assert shown.strip() in result.output
    (marked,) = [line for line in shown.splitlines() if line.startswith(" ▶")]
    assert marked.split()[:2] == ["▶", "plan"]
    assert "nan" not in shown.lower()
    assert max(map(len, [line for line in shown.splitlines() if line.startswith(" ")])) <= 90  # tiny KLs are long
    assert "need gradients" not in run("evaluate", "plan.json", *TEXT).output


@pytest.mark.parametrize(
    ("plan", "other", "code", "words"),
    [
        ("fine.json", "coarse.json", 0, "fine is better than the one other that stores no more bits"),
        ("coarse.json", "fine.json", 0, "nothing here stores as little as coarse"),
        ("fine.json", "fine.json", 5, "has the same KL"),
    ],
)
def test_check_exits_with_five_unless_all_that_store_no_more_are_beaten(
    folder: Path, plan: str, other: str, code: int, words: str
) -> None:
    result = run("evaluate", plan, "--against", other, "--check", "--no-rivals", *TEXT)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert only_evaluation().plan.name == Path(plan).stem or plan == other


def test_check_fails_where_a_rival_of_the_same_size_is_better(folder: Path) -> None:
    plan = json.loads(Path("coarse.json").read_text())
    for layer in plan["layers"]:
        layer["key"]["bits"], layer["value"]["bits"] = 1, 8
    Path("lopsided.json").write_text(json.dumps(plan))
    for layer in plan["layers"]:
        layer["key"]["bits"], layer["value"]["bits"] = 5, 4
    Path("even.json").write_text(json.dumps(plan))
    result = run("evaluate", "lopsided.json", "--against", "even.json", "--check", "--no-rivals", *TEXT)
    assert result.exit_code == 5, result.output
    assert "lopsided is not better than 1 of the 1 others" in " ".join(result.output.split())
    assert run("evaluate", "even.json", "--against", "lopsided.json", "--check", "--no-rivals", *TEXT).exit_code == 0


@pytest.mark.parametrize(
    "flags",
    [
        ("--against", "fine.json", "coarse.json"),
        ("--against", "fine.json", "--against", "coarse.json"),
        ("--against=fine.json", "coarse.json"),
    ],
)
def test_against_takes_several_files_in_any_spelling(folder: Path, flags: tuple[str, ...]) -> None:
    allocate(3, 2, "plan.json")
    result = run("evaluate", "plan.json", *flags, "--no-rivals", *TEXT)
    assert result.exit_code == 0, result.output
    assert [entry.name for entry in only_evaluation().plans] == ["plan", "fine", "coarse"]


def test_files_of_one_name_are_told_apart_by_their_folders(folder: Path) -> None:
    allocate(3, 2, "other/fine.json")
    assert run("evaluate", "fine.json", "--against", "other/fine.json", "--no-rivals", *TEXT).exit_code == 0
    assert [entry.name for entry in only_evaluation().plans] == ["fine.json", "other/fine.json"]


def test_a_plan_without_a_model_is_evaluated_on_the_model_that_is_named(folder: Path) -> None:
    bare = json.loads(Path("fine.json").read_text())
    bare = {key: bare[key] for key in ("schema", "quantizer", "window", "layers")} | {"model": {"num_layers": 2}}
    Path("bare.json").write_text(json.dumps(bare))
    result = run("evaluate", "bare.json", "--model", "./model", "--out", "results", *TEXT)
    assert result.exit_code == 0, result.output
    assert Evaluation.load("results/evaluation.json").plan.name == "bare"
    assert Path("results/gradients.json").exists()  # measured beside the result


@pytest.mark.parametrize("place", ["model", "./model", "model.json"])
def test_the_model_can_be_named_after_the_plan(folder: Path, place: str) -> None:
    Path("model").rename(place)  # a folder is a model whatever its name ends in
    again = run("evaluate", "fine.json", place, "--no-rivals", "--against", "coarse.json", *TEXT, "--out", "named")
    assert again.exit_code == 0, again.output
    assert run(
        "evaluate", "fine.json", "--model", place, "--no-rivals", "--against", "coarse.json", *TEXT, "--out", "option"
    ).exit_code == 0  # fmt: skip
    assert Path("named/evaluation.json").read_bytes() == Path("option/evaluation.json").read_bytes()


def test_the_model_after_the_plan_is_the_one_that_is_read(folder: Path) -> None:
    tiny_model("llama-mha").save_pretrained("other")
    result = run("evaluate", "fine.json", "./other", *TEXT)
    assert result.exit_code == 4
    assert "KV heads" in result.output


def test_a_plan_for_another_model_exits_with_four_before_anything_is_measured(folder: Path) -> None:
    tiny_model("llama-mha").save_pretrained("other")
    result = run("evaluate", "fine.json", "--model", "./other", *TEXT)
    assert result.exit_code == 4
    assert "KV heads" in result.output
    assert not list(Path("outputs").glob("*/gradients.json"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--sequence-length", "65"), 2, "the model was made for 64"),
        (("--measure-from", "63"), 2, "--measure-from 63"),
        (("--data", "none.txt"), 1, "none.txt: no such file"),
        (("--against", "other.json"), 4, "other: the plan is for another model"),
    ],
)
def test_a_bad_request_is_refused_before_any_rival_is_measured(
    folder: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    other = json.loads(Path("fine.json").read_text())
    other["model"]["fingerprint"] = "sha256:another"
    Path("other.json").write_text(json.dumps(other))
    result = run("evaluate", "fine.json", *TEXT, *arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert not list(Path("outputs").glob("*/gradients.*"))


def test_restart_discards_a_stopped_run_of_the_gradients_that_rivals_need(folder: Path) -> None:
    journal = next(Path("outputs").iterdir()) / "gradients.journal"
    settings = json.dumps(["settings", {"model": "another"}])
    journal.write_text(f"{hashlib.sha256(settings.encode()).hexdigest()[:16]} {settings}\n")
    refused = run("evaluate", "fine.json", *TEXT)
    assert refused.exit_code == 4
    assert "add --restart" in refused.output
    assert run("evaluate", "fine.json", *TEXT, "--restart").exit_code == 0


def test_scores_of_another_model_in_the_folder_are_not_taken_for_this_ones(folder: Path) -> None:
    there = next(Path("outputs").glob("*/norms.json"))
    norms = json.loads(there.read_text())
    there.unlink()
    norms["model"]["fingerprint"] = "sha256:another"
    Path("results").mkdir()
    Path("results/norms.json").write_text(json.dumps(norms))
    Path("results/gradients.json").write_text("{")
    result = run("evaluate", "fine.json", "--out", "results", *TEXT)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "the baselines need norms, measured now" in said
    assert "not valid JSON" in said
    assert "the baselines need gradients, measured now" in said


def test_scores_of_the_model_are_found_wherever_the_results_go(folder: Path) -> None:
    assert run("gradients", "./model", *TEXT, "--formats", "none").exit_code == 0
    result = run("evaluate", "fine.json", "--out", "elsewhere", *TEXT)
    assert result.exit_code == 0, result.output
    assert "measured now" not in result.output
    usual = next(Path("outputs").iterdir())
    said = "".join(result.output.split())
    assert f"normsfrom{usual}/norms.json" in said
    assert f"gradientsfrom{usual}/gradients.json" in said
    assert [path.name for path in Path("elsewhere").iterdir()] == ["evaluation.json"]
    assert "are not counted" not in run("evaluate", "fine.json", "--out", "new", *TEXT, "--dry-run").output


def test_the_gradients_that_a_plan_was_made_from_are_taken_before_others(folder: Path) -> None:
    measure = ("gradients", "./model", *TEXT, "--formats", "none", "--out")
    assert run(*measure, "plans", "--seed", "1").exit_code == 0
    Path("plans/gradients.json").rename("plans/mine.json")
    assert run(*measure, "elsewhere").exit_code == 0
    plan = ("--budget", "4", "--scores", "plans/mine.json", "--out", "plans/plan.json")
    assert run("allocate", *plan, "--recent-tokens", "4", "--sink-tokens", "1", "--group-size", "4").exit_code == 0
    result = run("evaluate", "plans/plan.json", "--out", "elsewhere", *TEXT)
    assert result.exit_code == 0, result.output
    assert "gradientsfromplans/mine.json" in "".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("missing.json",), 1, "missing.json: no such file"),
        (("fine.json", "--check", "--no-rivals"), 2, "--check has nothing to compare with"),
        (("fine.json", "--no-rivals", "--against", "missing.json"), 1, "missing.json: no such file"),
        (("fine.json", "--no-rivals", "--sequence-length", "65"), 2, "the model was made for 64"),
        (("fine.json", "--no-rivals", "--measure-from", "63"), 2, "--measure-from 63"),
        (("fine.json", "--no-rivals", "--data", "none.txt"), 1, "none.txt: no such file"),
        (("fine.json", "--no-rivals", "--dtype", "float23"), 2, "did you mean 'float32'?"),
        (("fine.json", "--no-rivals", "--model", "./nowhere"), 1, "no model at ./nowhere"),
        (("outputs",), 1, "outputs"),
        (("fine.json", "coarse.json"), 2, "coarse.json is no model, which the second argument is. Compare plans with"),
        (("fine.json", "missing.json"), 2, "missing.json is no model"),
        (("fine.json", "text.txt"), 2, "text.txt is no model"),
        (("fine.json", "./nowhere"), 1, "no model at ./nowhere"),
        (("fine.json", "nowhere.gguf"), 1, "no model at nowhere.gguf"),
        (("fine.json", "./model", "--model", "./model"), 2, "MODEL is './model' and --model is './model'."),
        (("fine.json", "./model", "coarse.json"), 2, "unexpected extra argument"),
        (("fine.json", "--against", "coarse.json", "./model"), 1, "model"),
    ],
)
def test_a_bad_request_is_one_message_and_its_exit_code(
    folder: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    result = run("evaluate", *arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_validate_and_schema_know_the_file(folder: Path) -> None:
    assert run("evaluate", "fine.json", "--no-rivals", *TEXT).exit_code == 0
    file = next(Path("outputs").glob("*/evaluation.json"))
    assert run("validate", file, "./model").exit_code == 0
    tiny_model("llama-mha").save_pretrained("other")
    assert run("validate", file, "./other").exit_code == 4
    assert json.loads(run("schema", "evaluation").output)["title"] == "Evaluation"


def test_bits_are_told_in_the_table_as_the_plan_has_them(folder: Path) -> None:
    result = run("evaluate", "fine.json", "--no-rivals", *TEXT)
    budget = BitPlan.load("fine.json").budget
    assert budget is not None
    assert only_evaluation().plan.nominal_bits == budget.nominal_bits
    assert only_evaluation().plan.stored_bits == budget.stored_bits
    assert "window included; " in result.output
    assert "though the model ran in float32" in result.output


def test_text_that_stays_within_the_window_is_said_to_show_nothing(folder: Path) -> None:
    plan = json.loads(Path("fine.json").read_text())
    plan["window"]["recent_tokens"] = 1000
    for entry in plan["layers"]:
        entry["key"]["bits"] = entry["value"]["bits"] = 2
    plan["budget"] = None
    Path("wide.json").write_text(json.dumps(plan))
    result = run("evaluate", "wide.json", "--no-rivals", *TEXT)
    assert result.exit_code == 0, result.output
    assert "nothing was quantized" in result.output
    refused = run("evaluate", "wide.json", "--check", "--against", "fine.json", *TEXT)
    assert refused.exit_code == 2
    assert "--check would compare nothing" in refused.output


def test_a_window_that_dilutes_the_means_is_named(folder: Path) -> None:
    plan = json.loads(Path("fine.json").read_text())
    plan["window"] = {"sink_tokens": 0, "recent_tokens": 30}
    for entry in plan["layers"]:
        entry["key"] |= {"bits": 2}
        entry["value"] |= {"bits": 2}
    plan["budget"] = None
    Path("wide.json").write_text(json.dumps(plan))
    result = run("evaluate", "wide.json", "--no-rivals", *TEXT)
    assert "of the measured tokens read anything quantized" in result.output
    first = int(result.output.split("--measure-from ")[1].split()[0])
    fewer = run("evaluate", "wide.json", "--no-rivals", *TEXT, "--measure-from", str(first))
    assert "of the measured tokens read anything quantized" not in fewer.output
