"""`gradients`, `divergence`, `calibrate`, `audit` as a user types them: one after another, and with what cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from folders import save_folder, save_text
from tiny import tiny_model
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.records.audit import Audit
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores

WINDOW = ("--sink-tokens", "1", "--recent-tokens", "4")
TEXT = ("--data", "text.txt", "--pack", "--sequences", "3", "--sequence-length", "40", "--device", "cpu")
KEYS, VALUES = ("int2g4", "int4g4", "int8g4"), ("int2g8", "int3g8", "rot2", "int8g8")
FORMATS = ("--formats", ",".join([f"key:{name}" for name in KEYS] + [f"value:{name}" for name in VALUES]))


def run(*arguments: str | Path) -> Result:
    """Run a command in this process; an exception that is no exit is a failure."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: str | Path) -> str:
    """Run a command that must end well; return what it said, lines joined."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its scores and three plans; no test changes it."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_folder(folder / "model")
        save_text(folder / "text.txt", rows=60)
        done("norms", "./model")
        done("gradients", "./model", *TEXT, *WINDOW, *FORMATS)
        done("divergence", "./model", *TEXT, *WINDOW, "--formats", "key:int2g4,value:int2g8,value:rot2")
        for budget in ("8", "9.5"):
            done("allocate", "--budget", budget, "--scores", gradients(), "--out", f"plan-{budget}.json")
    return folder


@pytest.fixture
def folder(measured: Path, in_tmp: Path) -> Path:
    """A copy of it to work in."""
    shutil.copytree(measured, in_tmp, dirs_exist_ok=True)
    # The model's id is the path of the first one: plans and scores name that, and it is still there.
    return in_tmp


def gradients() -> Path:
    return next(Path("outputs").glob("*/gradients.json"))


def outputs() -> Path:
    return gradients().parent


def test_a_divergence_is_scores_that_show_and_validate_know(folder: Path) -> None:
    sample = ("--formats", "int2g4", "--layers", "1", "--tensors", "key")
    said = done("divergence", "./model", *TEXT, *WINDOW, *sample, "--out", "here")
    file = Path("here/divergence.json")
    assert "measured divergence of" in said
    assert "3 sequences, the last 50% of each (60 tokens) of text.txt; sinks 1, window 4" in said
    assert "keys int2g4" in said
    assert "written to" in said
    assert "a valid kvprof.scores/1 file" in done("validate", file)
    shown = done("show", file)
    assert "measured divergence of" in shown
    assert "none of the metrics" not in shown
    scores = Scores.load(file)
    assert [entry.key.loss_increase is not None for entry in scores.layers] == [False, True]


def test_plans_calibrate_the_scores_they_were_made_from(folder: Path) -> None:
    before = Scores.load(gradients())
    said = done("calibrate", "plan-8.json", "plan-9.5.json", "--device", "cpu")
    after = Scores.load(gradients())
    assert f"written to {gradients()}" in said
    assert "on 3 sequences of text.txt" in said  # all that the scores have, of 4
    assert "plan-8 " in said
    assert f"factor {after.kl_calibration.factor:.3f}, fitted to 2 plans" in said
    assert after.digest == before.digest
    done("calibrate", "plan-8.json", "--device", "cpu", "--sequences", "2")  # found again, though the file has changed
    again = Scores.load(gradients()).kl_calibration
    assert (again.plans, again.sequences) == (1, 2)


def test_from_then_on_plans_are_predicted_with_the_factor(folder: Path) -> None:
    before = BitPlan.load("plan-8.json").solver
    done("calibrate", "--device", "cpu")
    factor = Scores.load(gradients()).kl_calibration.factor
    done("allocate", "--budget", "8", "--scores", gradients(), "--out", "again.json")
    after = BitPlan.load("again.json").solver
    assert after.objective == before.objective
    assert after.predicted_kl_nats == pytest.approx(factor * before.predicted_kl_nats)


def test_without_plans_calibrate_makes_some(folder: Path) -> None:
    said = done("calibrate", "--device", "cpu", "--sequences", "2")
    assert said.count("best within") == 2
    assert Scores.load(gradients()).kl_calibration.plans == 2
    assert not list(Path().glob("best*.json"))


def test_an_audit_prints_ranks_ratios_and_whole_plans_and_draws_a_picture(folder: Path) -> None:
    done("evaluate", "plan-8.json", "--against", "plan-9.5.json", "--no-rivals", *TEXT, "--out", outputs())
    for name in ("plan-8.json", "plan-9.5.json"):
        Path(name).rename(outputs() / name)
    said = done("audit")
    file = outputs() / "audit.json"
    for words in (
        "rank correlation (Spearman) with measured divergence at 2 bits",
        "loss_increase: predicted over measured, tensor by tensor",
        "spectral_norm",
        "whole plans: predicted KL and what evaluate measured",
        "kvprof calibrate measures one",
        f"written to {file}",
        f"written to {outputs() / 'plots' / 'audit.png'}",
    ):
        assert words in said
    audit = Audit.load(file)
    assert [check.name for check in audit.plans] == ["plan-8", "plan-9.5"]
    assert audit.plans[0].predicted_kl_nats == BitPlan.load(outputs() / "plan-8.json").solver.predicted_kl_nats
    assert {one.label for one in audit.agreements} == {
        "loss_increase",
        "gradient_norm",
        "spectral_norm",
        "frobenius_norm",
    }
    assert (outputs() / "plots" / "audit.png").stat().st_size > 10_000
    assert done("show", file) in said
    assert "a valid kvprof.audit/1 file, and it fits ./model" in done("validate", file, "./model")
    tiny_model("llama-mha").save_pretrained("other")
    assert run("validate", file, "./other").exit_code == 4
    done("calibrate", outputs() / "plan-8.json", "--device", "cpu")
    assert "predictions hold the factor" in done("audit", outputs())


def test_an_audit_takes_named_files_and_another_folder(folder: Path) -> None:
    done("evaluate", "plan-8.json", "--no-rivals", *TEXT, "--out", "elsewhere")
    named = ("--scores", gradients(), "--plans", "plan-8.json", "--evaluations", "elsewhere/evaluation.json")
    said = done("audit", outputs() / "divergence.json", *named, "--out", "results")
    assert "spectral_norm" not in said
    assert "plan-8 " in said
    assert sorted(path.name for path in Path("results").rglob("*.*")) == ["audit.json", "audit.png"]


def test_norms_alone_have_ranks_and_no_picture(folder: Path) -> None:
    said = done("audit", "--scores", outputs() / "norms.json", "--out", "results")
    assert "only ranks are compared" in said
    assert not Path("results/plots").exists()


def test_no_picture_of_an_earlier_audit_stays(folder: Path) -> None:
    done("audit", "--out", "results")
    assert Path("results/plots/audit.png").exists()
    done("audit", "--scores", outputs() / "norms.json", "--out", "results")
    assert not Path("results/plots/audit.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("gradients", "./model", "--stable-at", "3"), 2, "Add --until-stable"),
        (("gradients", "./model", "--until-stable", "--formats", "none"), 2, "Leave out --formats none"),
        (
            ("gradients", "./model", "--until-stable", "--stable-at", "99", *TEXT, *WINDOW, *FORMATS),
            3,
            "--stable-at 99: plans of these formats have",
        ),
        (
            ("gradients", "./model", "--until-stable", "--formats", "key:int2g4", *TEXT, *WINDOW),
            2,
            "no format is predicted for the value of layer 0",
        ),
        (("divergence", "./model", "--formats", "int9g4"), 2, "'int9g4' is no format"),
        (("divergence", "./model", "--layers", "7"), 2, "there is no layer 7; the last is 1"),
        (("divergence", "./model", "--tensors", "keys"), 2, "did you mean 'key'"),
        (("divergence", "./model", "--data", "none.txt"), 1, "none.txt: no such file"),
        (("divergence", "./model", "--data", "text.txt", "--data", "text.txt"), 2, "names text.txt twice"),
        (("divergence", "./model", *TEXT), 2, "so 197 tokens are the least"),
        (("divergence", "./nowhere"), 1, "no model at ./nowhere"),
        (("divergence", "./model", "--suffix-fraction", "2"), 2, "should be less than or equal to"),
        (("calibrate", "missing.json"), 1, "missing.json: no such file"),
        (("calibrate", "text.txt"), 1, "not valid JSON"),
        (("calibrate", "--scores", "missing.json"), 1, "missing.json: no such file"),
        (("calibrate", "--scores", "plan-8.json"), 1, "expected 'kvprof.scores/1'"),
        (("calibrate", "plan-8.json", "--sequences", "0"), 2, "--sequences 0"),
        (("calibrate", "plan-8.json", "--model", "./other"), 4, "for another model"),
        (("calibrate", "plan-8.json", "--dtype", "float23"), 2, "did you mean 'float32'"),
        (
            ("calibrate", "unscored.json", "--scores", "gradients.json"),
            1,
            "unscored: int5g32 was not scored for the key",
        ),
        (("calibrate", "plan-8.json", "--scores", "norms.json"), 1, "have no loss_increase"),
        (("calibrate", "--scores", "norms.json"), 1, "loss_increase"),
        (("calibrate", "bare.json"), 1, "does not say which scores it was made from"),
        (("calibrate", "bare.json", "plan-8.json", "norm-plan.json"), 2, "were made from different scores"),
        (("audit", "missing.json"), 1, "missing.json: no such file"),
        (("audit", "gradients.json"), 2, "Run `kvprof divergence` first"),
        (("audit", "gradients.json", "--scores", "norms.json"), 2, "Run `kvprof divergence` first"),
        (("audit", "--scores", "plan-8.json"), 1, "expected 'kvprof.scores/1'"),
        (("audit", "--scores", "stranger.json"), 4, "file stranger is for another model"),
        (("audit", "--evaluations", "plan-8.json"), 1, "expected 'kvprof.evaluation/1'"),
        (("audit", "--plans", "missing.json"), 1, "missing.json: no such file"),
        (("audit", "--out", "text.txt"), 1, "text.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_one_message_and_its_exit_code(
    folder: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    tiny_model("llama-mha").save_pretrained("other")
    for name in ("gradients", "norms"):
        Path(f"{name}.json").write_bytes((outputs() / f"{name}.json").read_bytes())
    stranger = json.loads(Path("gradients.json").read_text())
    stranger["model"]["fingerprint"] = "sha256:another"
    Path("stranger.json").write_text(json.dumps(stranger))
    assert run("allocate", "--budget", "3", "--scores", "norms.json", "--out", "norm-plan.json").exit_code == 0
    plan = json.loads(Path("plan-8.json").read_text())
    Path("bare.json").write_text(json.dumps(plan | {"provenance": None}))
    plan["layers"][0]["key"] |= {"bits": 5, "group_size": 32}
    Path("unscored.json").write_text(json.dumps(plan | {"budget": None}))
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list(outputs().glob("*.journal"))


def test_without_a_divergence_the_audit_says_what_to_run(in_tmp: Path) -> None:
    result = run("audit")
    assert result.exit_code == 1
    assert "Run `kvprof divergence` first" in result.output


def test_an_audit_imports_no_torch(folder: Path) -> None:
    code = """
import sys
sys.argv = ["kvprof", "audit"]
from kvprof.__main__ import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
found = [name for name in ("torch", "transformers", "datasets", "safetensors") if name in sys.modules]
assert not found, found
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_help_needs_no_matplotlib(folder: Path) -> None:
    code = "import sys; import kvprof.cli.audit, kvprof.report.audits; assert 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
