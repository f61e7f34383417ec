"""`kvprof allocate` and `kvprof frontier` with scores of formats, as a user runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from score_factories import random_scores
from test_commands import handmade_scores, run

from kvprof import BitPlan
from kvprof.records.frontier import Frontier

DECODING = {"window": {"sink_tokens": 2, "recent_tokens": 64}, "suffix_fraction": 0.5, "tokens": 512}


@pytest.fixture
def outputs(in_tmp: Path) -> Path:
    """A folder of outputs with the scores of a model of six layers."""
    folder = in_tmp / "outputs" / "mine"
    folder.mkdir(parents=True)
    random_scores(6, factor=1.5).save(folder / "gradients.json")
    return folder


def test_a_budget_alone_is_enough(outputs: Path) -> None:
    result = run("allocate", "--budget", "2.5")
    assert result.exit_code == 0, result.output
    plan = BitPlan.load("outputs/handmade/plan-2.50.json")
    assert plan.budget is not None
    assert plan.solver is not None
    assert (plan.budget.unit, plan.solver.metric) == ("stored", "loss_increase")
    said = " ".join(result.output.split())
    assert "asked for: 2.5 stored bits an element" in said
    assert "nats a token of KL divergence (fitted: 1.5 times what the scores predict)" in said
    assert f"± {plan.solver.predicted_kl_stderr_nats:#.2g}" in said


def test_no_command_writes_over_the_measurement_that_it_reads(outputs: Path) -> None:
    scores = outputs / "gradients.json"
    before = scores.read_bytes()
    assert run("allocate", "--budget", "2.5", "--scores", str(scores), "--out", "plan.json").exit_code == 0
    for command in (
        ("allocate", "--budget", "2.5", "--scores", str(scores), "--out", str(scores)),
        ("frontier", "--scores", str(scores), "--points", "3", "--out", str(scores)),
        ("export", "plan.json", "--to", "transformers", "--out", str(scores)),
    ):
        result = run(*command)
        assert result.exit_code == 2
        said = " ".join(result.output.split())
        assert "gradients.json holds kvprof's scores, which would be lost. Name another file with --out." in said
        assert scores.read_bytes() == before
    again = ("allocate", "--budget", "3", "--scores", str(scores), "--out", "plan.json")
    assert run(*again).exit_code == 0  # a plan over a plan


def test_scores_that_were_not_calibrated_are_said_to_be(in_tmp: Path) -> None:
    random_scores(2).save("mine.json")
    said = " ".join(run("allocate", "--budget", "2.5", "--scores", "mine.json", "--out", "p").output.split())
    assert "not fitted: kvprof calibrate measures whole plans" in said


def test_every_option_reaches_the_plan(outputs: Path) -> None:
    options = (
        "--formats",
        "rot2,rot3,key:int4g64",
        "--min-key-bits",
        "3",
        "--pin",
        "value:0=rot2",
        "--unit",
        "nominal",
    )
    assert run("allocate", "--budget", "2.9", *options).exit_code == 0
    plan = BitPlan.load("outputs/handmade/plan-2.90-nominal.json")
    assert {entry.key.name for entry in plan.layers} <= {"rot3", "int4g64"}
    assert plan.layers[0].value.name == "rot2"
    assert run("allocate", "--budget", "3", "--tie", "key-value").exit_code == 0
    plan = BitPlan.load("outputs/handmade/plan-3.00.json")
    assert all(entry.key.bits == entry.value.bits for entry in plan.layers)
    assert run("allocate", "--budget", "4.3", "--group-size", "128", "--bits", "4").exit_code == 0


def test_the_window_is_the_scores_own_and_another_one_is_remarked_upon(in_tmp: Path) -> None:
    scores = json.loads(random_scores(2).to_text()) | {"decoding": DECODING}
    Path("mine.json").write_text(json.dumps(scores))
    command = ("allocate", "--budget", "3", "--scores", "mine.json", "--out", "plan.json")
    assert "were measured with" not in run(*command).output
    assert BitPlan.load("plan.json").window.recent_tokens == 64
    said = " ".join(run(*command, "--recent-tokens", "32").output.split())
    assert "the first 2 and the last 64 tokens in full precision, the plan keeps the first 2 and the last 32" in said
    assert BitPlan.load("plan.json").window.sink_tokens == 2


def test_formats_of_another_runtime_are_named_as_passed_over(in_tmp: Path) -> None:
    tensor = {"loss_increase": {"int2g64": 0.1, "int4g64": 0.01, "q4_0": 0.001}}
    layers = [{"layer": 0, "key": tensor, "value": tensor}]
    Path("mine.json").write_text(json.dumps({"schema": "kvprof.scores/1", "layers": layers}))
    result = run("allocate", "--budget", "3", "--scores", "mine.json", "--out", "plan.json")
    assert result.exit_code == 0, result.output
    assert "passed over, as no plan of kvprof's can store them: q4_0" in " ".join(result.output.split())


def test_losses_of_some_tensors_only_are_not_planned_by_and_that_is_said(in_tmp: Path) -> None:
    value = json.loads(random_scores(2).to_text())
    for layer in value["layers"]:
        for tensor in ("key", "value"):
            layer[tensor]["gradient_norm"] = 1 + layer["layer"]
        layer["value"] = {"gradient_norm": 1}
    Path("mine.json").write_text(json.dumps(value))
    said = " ".join(run("allocate", "--budget", "3", "--scores", "mine.json", "--out", "plan.json").output.split())
    assert "planned by gradient_norm: loss_increase is there for some tensors, not for the value of layer 0" in said


def test_the_greedy_rule_goes_by_norms_whatever_is_newer(outputs: Path) -> None:
    value = json.loads(random_scores(6).to_text()) | {"source": "norms"}
    for layer in value["layers"]:
        for tensor in ("key", "value"):
            layer[tensor] = {"spectral_norm": 1.0 + layer["layer"], "frobenius_norm": 1}
    result = run("allocate", "--rule", "norm-greedy", "--budget", "3")
    assert result.exit_code == 1
    assert "Run `kvprof norms` first" in result.output
    (outputs / "norms.json").write_text(json.dumps(value))
    result = run("allocate", "--rule", "norm-greedy", "--budget", "3", "--out", "plan.json")
    assert result.exit_code == 0, result.output
    assert BitPlan.load("plan.json").solver.metric == "spectral_norm"


def test_max_kl_writes_the_cheapest_plan_and_says_what_it_is(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kvprof", "allocate", "--max-kl", "0.01"])
    result = run("allocate", "--max-kl", "0.01")
    assert result.exit_code == 0, result.output
    plan = BitPlan.load("outputs/handmade/plan-kl-0.01.json")
    assert plan.solver is not None
    assert plan.solver.predicted_kl_nats is not None
    assert plan.solver.predicted_kl_nats <= 0.01
    assert plan.provenance is not None
    assert plan.provenance.command == "kvprof allocate --max-kl 0.01"
    said = " ".join(result.output.split())
    assert "the cheapest of all" in said
    assert "takes no budget" not in said
    in_bytes = run("allocate", "--max-kl", "0.01", "--context", "4096", "--batch", "2")
    assert "bytes" in in_bytes.output
    assert "at 4096 tokens x 2" in in_bytes.output
    assert "None" not in in_bytes.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("allocate", "--max-kl", "1e-12"), 3, ["below", "try --max-kl"]),
        (("allocate", "--max-kl", "much"), 2, ["no KL divergence"]),
        (("allocate", "--max-kl", "0.01", "--budget", "3"), 2, ["leave out --budget"]),
        (("allocate", "--budget", "1"), 3, ["cheapest plan: 1.75", "try --budget 1.75"]),
        (("allocate", "--budget", "2", "--min-key-bits", "4"), 3, ["try --budget", "or loosen --min-key-bits"]),
        (("allocate", "--budget", "9", "--tie", "key-value"), 3, ["or loosen --tie"]),
        (("allocate", "--budget", "2", "--formats", "int4g64,rot3"), 3, ["or loosen --formats"]),
        (("allocate", "--max-kl", "1e-6", "--pin", "key:*=2"), 3, ["or loosen --pin"]),
        (("allocate", "--budget", "3", "--formats", "int5g64"), 2, ["was not scored", "int2g128"]),
        (("allocate", "--budget", "3", "--formats", "q4_1"), 2, ["q4_1 was not scored"]),
        (("allocate", "--budget", "3", "--formats", "MXFP4"), 2, ["'MXFP4' is no format"]),
        (("allocate", "--budget", "3", "--tie", "all"), 2, ["unknown --tie 'all'", "key-value"]),
        (("allocate", "--budget", "3", "--min-key-bits", "17"), 2, ["min-key-bits"]),
        (
            (
                "allocate",
                "--scores",
                "outputs/mine/gradients.json",
                "--budget",
                "3",
                "--rule",
                "norm-greedy",
                "--tie",
                "key-value",
            ),
            2,
            ["takes no --tie"],
        ),
        (("frontier", "--from", "1"), 3, ["try --from 1.75"]),
        (("frontier", "--points", "1"), 2, ["points"]),
        (("frontier", "--from", "4", "--to", "3"), 2, ["--from 4 is more than --to 3"]),
        (("frontier", "--scores", "nowhere.json"), 1, ["nowhere.json: no such file"]),
    ],
)
def test_a_bad_request_is_one_message_and_its_exit_code(
    outputs: Path, arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    result = run(*arguments, "--out", "made")
    assert result.exit_code == code, result.output
    said = " ".join(result.output.split())
    for word in words:
        assert word in said
    assert not list(Path().glob("made/*.json"))


def test_a_frontier_is_a_file_a_table_and_a_picture(outputs: Path) -> None:
    result = run("frontier", "--context", "4096")
    assert result.exit_code == 0, result.output
    found = Frontier.load("outputs/handmade/frontier.json")
    assert found.knees
    said = " ".join(result.output.split())
    for knee in found.knees:
        assert f"kvprof allocate --budget {knee.budget:g}" in said
        assert run("allocate", "--budget", f"{knee.budget:g}", "--out", "plan.json").exit_code == 0
        assert BitPlan.load("plan.json").recipe == knee.plan_digest
    assert Path("outputs/handmade/plots/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "frontier of handmade" in run("show", "outputs/handmade/frontier.json").output
    assert "kvprof.frontier/1" in run("validate", "outputs/handmade/frontier.json").output
    assert json.loads(run("schema", "frontier").output)["title"] == "Frontier"


def test_without_matplotlib_a_frontier_says_what_to_install(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = run("frontier", "--from", "2", "--to", "3")
    assert result.exit_code == 0, result.output
    assert "kvprof-bits[plot]" in " ".join(result.output.split())
    assert Path("outputs/handmade/frontier.json").exists()


def test_a_frontier_needs_losses(in_tmp: Path) -> None:
    result = run("frontier", "--scores", handmade_scores(in_tmp / "mine.json"))
    assert result.exit_code == 2
    assert "kvprof gradients" in result.output
    result = run("frontier")
    assert result.exit_code == 1
    assert "no scores with loss_increase" in result.output
