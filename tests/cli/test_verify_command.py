"""verify as a user types it: what holds, what differs, what cannot be checked, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from folders import edit_weights, save_folder, save_text
from score_factories import random_scores
from test_commands import handmade_scores, run

from kvprof import BitPlan, Scores, __version__
from kvprof.api.schemas import schema_for

LAYERS = 6
SCORES = "outputs/handmade/gradients.json"
PLAN = "outputs/handmade/plan-3.00.json"
SOLVED = ("formats", "budget asked for", "window", "optimality")


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """Calibrated scores in outputs/, and the plan that kvprof makes of them."""
    scores = random_scores(LAYERS, 4, factor=1.5)
    scores.model_copy(update={"kvprof_version": __version__}).save(SCORES)
    assert run("allocate", "--budget", "3").exit_code == 0
    return in_tmp


def checks(*words: str, code: int) -> dict[str, dict[str, Any]]:
    """Verify, and return the checks by name."""
    done = run("verify", *words, "--json")
    assert done.exit_code == code, done.output
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, schema_for("verify"))
    names = [check["name"] for check in answer["checks"]]
    assert len(names) == len(set(names))
    return {check["name"]: check for check in answer["checks"]}


def statuses(*words: str, code: int) -> dict[str, str]:
    return {name: check["status"] for name, check in checks(*words, code=code).items()}


def edit(path: str, change: Callable[[Any], None], to: str | None = None) -> str:
    value = json.loads(Path(path).read_text())
    change(value)
    target = Path(to or path)
    target.write_text(json.dumps(value))
    return str(target)


def test_a_plan_as_it_was_made_holds_in_every_part(folder: Path) -> None:
    found = statuses(PLAN, code=0)
    unchecked = {name for name, status in found.items() if status == "unknown"}
    assert unchecked == {"model", "calibration text"}
    assert "differs" not in found.values()
    assert {"scores", "objective", "predicted KL", "nominal bits", "stored bits", "bytes per token", *SOLVED} < {*found}


@pytest.mark.parametrize(
    "options",
    [
        ("--budget", "2.5", "--unit", "nominal"),
        ("--memory", "9 MiB", "--context", "4096", "--batch", "2"),
        ("--max-kl", "0.01"),
        ("--max-kl", "0.01", "--context", "4096"),
        ("--budget", "3.5", "--pin", "key:*=int4g64", "--pin", "value:1-2=rot2"),
        ("--budget=4", "--tie=key-value", "--bits", "2,3,4,8", "--min-key-bits", "3"),
        ("--budget", "3.5", "--sink-tokens", "0", "--recent-tokens", "32", "--formats", "int4g64, int2g64"),
        ("--rule", "uniform", "--bits-key", "4", "--bits-value", "2", "--group-size", "64"),
        ("--rule", "uniform", "--formats", "key:int3g64,value:rot2"),
        ("--budget", "5", "--target", "transformers"),
    ],
    ids=" ".join,
)
def test_every_way_to_ask_is_asked_again(folder: Path, options: tuple[str, ...]) -> None:
    done = run("allocate", *options, "--out", "plan.json")
    assert done.exit_code == 0, done.output
    found = statuses("plan.json", code=0)
    assert [found[name] for name in SOLVED] == ["holds"] * 4
    assert "differs" not in found.values()


@pytest.mark.parametrize("rule", [("--rule", "norm-greedy", "--budget", "3"), ("--budget", "3", "--unit", "stored")])
def test_a_plan_by_a_norm_is_solved_again(in_tmp: Path, rule: tuple[str, ...]) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    assert run("allocate", *rule, "--scores", scores, "--out", "plan.json").exit_code == 0
    found = checks("plan.json", code=0)
    assert [found[name]["status"] for name in SOLVED] == ["holds"] * 4
    assert found["objective"]["status"] == "holds"
    assert found["bytes per token"]["note"] == "the plan carries no geometry"
    assert found["kvprof of the scores"]["status"] == "unknown"


def test_a_plan_made_in_python_is_solved_again(folder: Path) -> None:
    import kvprof

    kvprof.allocate(SCORES, 3.5, pin="key:0=int6g64", bits=[2, 3, 4, 6], sink_tokens=2, out="plan.json")
    found = statuses("plan.json", code=0)
    assert [found[name] for name in SOLVED] == ["holds"] * 4


def swap_keys(plan: Any) -> None:
    layers = plan["layers"]
    other = next(layer for layer in layers if layer["key"] != layers[0]["key"])
    layers[0]["key"], other["key"] = other["key"], layers[0]["key"]


def more_bits(plan: Any) -> None:
    plan["layers"][0]["key"] |= {"scheme": "asymmetric", "bits": 6, "group_size": 64, "axis": "channel", "clip": "none"}


ALTERED: dict[str, tuple[Callable[[Any], None], set[str]]] = {
    "two keys swapped": (swap_keys, {"formats", "objective", "predicted KL", "its standard error"}),
    "more bits for a key": (
        more_bits,
        {"formats", "objective", "predicted KL", "its standard error", "nominal bits", "stored bits", "bytes per token",
         "budget kept"},
    ),
    "stored bits": (lambda plan: plan["budget"].update(stored_bits=2.0), {"stored bits"}),
    "nominal bits": (lambda plan: plan["budget"].update(nominal_bits=1.0), {"nominal bits"}),
    "bytes": (lambda plan: plan["budget"].update(bytes_per_token=1.0), {"bytes per token"}),
    "a smaller budget": (lambda plan: plan["budget"].update(requested=2.0), {"budget asked for", "budget kept"}),
    "a KL": (lambda plan: plan["solver"].update(predicted_kl_nats=1e-9), {"predicted KL"}),
    "an objective": (lambda plan: plan["solver"].update(objective=1e-9), {"objective"}),
    "optimality": (lambda plan: plan["solver"].update(optimal=False), {"optimality"}),
    "the window": (lambda plan: plan["window"].update(sink_tokens=0), {"window"}),
    "the rotation": (lambda plan: plan["quantizer"].update(rotation_seed=1), {"window"}),
    "the id": (lambda plan: plan["model"].update(id="another"), {"model id of the scores"}),
    "the architecture": (lambda plan: plan["model"].update(architecture="Other"), {"architecture of the scores"}),
    "the dtype": (lambda plan: plan["geometry"].update(dtype="float32"), {"cache of the scores"}),
    "a kind of layer": (lambda plan: plan["geometry"]["layers"][2].update(kind="hybrid"), {"cache of the scores"}),
    "the version": (lambda plan: plan.update(kvprof_version="0.0.1"), {"kvprof of the plan"}),
    "the command": (
        lambda plan: plan["provenance"].update(command="kvprof allocate --budget 4"), {"command"},
    ),
    "the request": (
        lambda plan: plan["provenance"]["request"].update(budget="4"), {"formats", "budget asked for", "command"},
    ),
    "a request that is refused": (
        lambda plan: plan["provenance"]["request"].update(budget="0.1"), {*SOLVED, "command"},
    ),
    "the command of an older plan": (
        lambda plan: plan["provenance"].update(command="kvprof allocate --budget 4", request=None),
        {"formats", "budget asked for"},
    ),
    "a command of an older plan that is refused": (
        lambda plan: plan["provenance"].update(command="kvprof allocate --budget 0.1", request=None), {*SOLVED},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ALTERED)
def test_what_was_altered_differs_and_nothing_else(folder: Path, what: str) -> None:
    change, expected = ALTERED[what]
    edit(PLAN, change, "altered.json")
    found = statuses("altered.json", code=4)
    assert {name for name, status in found.items() if status == "differs"} == expected


def test_a_difference_is_told_with_both_values_and_exit_code_four(folder: Path) -> None:
    edit(PLAN, ALTERED["stored bits"][0])
    done = run("verify", PLAN)
    assert done.exit_code == 4
    plan = BitPlan.load(PLAN)
    assert plan.budget is not None
    assert "stored bits: DIFFERS: the file says 2, found 3" in done.stdout
    assert "1 of " in done.stderr
    assert "1 differ" in done.stdout


def test_scores_that_are_gone_leave_the_costs_to_check(folder: Path) -> None:
    Path(SCORES).unlink()
    found = checks(PLAN, code=0)
    assert found["scores"]["status"] == "unknown"
    assert "are not beside it" in found["scores"]["note"]
    assert found["stored bits"]["status"] == "holds"
    edit(PLAN, ALTERED["stored bits"][0])
    assert statuses(PLAN, code=4)["stored bits"] == "differs"


def test_scores_altered_in_their_place_differ(folder: Path) -> None:
    def double(scores: Any) -> None:
        losses = scores["layers"][0]["key"]
        losses["loss_increase"] = {name: 2 * loss for name, loss in losses["loss_increase"].items()}
        losses["loss_increase_samples"] = {
            name: [2 * loss for loss in row] for name, row in losses["loss_increase_samples"].items()
        }

    edit(SCORES, double)
    found = checks(PLAN, code=4)
    assert (found["scores"]["said"], found["scores"]["found"]) == (
        BitPlan.load(PLAN).scores_digest, Scores.load(SCORES).digest,
    )  # fmt: skip
    assert found["objective"]["status"] == "differs"


def test_calibrating_since_changes_no_check_and_another_factor_does(folder: Path) -> None:
    edit(SCORES, lambda scores: scores.pop("kl_calibration"))
    assert run("allocate", "--budget", "3", "--out", "before.json").exit_code == 0
    factor = {"factor": 3.0, "plans": 4, "sequences": 8, "spread": 1.1}
    edit(SCORES, lambda scores: scores.update(kl_calibration=factor))
    found = checks("before.json", code=0)
    assert found["predicted KL"]["note"] == "before the scores were calibrated"
    assert {name for name, status in statuses(PLAN, code=4).items() if status == "differs"} == {
        "predicted KL", "its standard error",
    }  # fmt: skip


def test_a_calibrated_plan_of_before_factors_were_written_down_still_holds(folder: Path) -> None:
    edit(PLAN, lambda plan: plan["solver"].pop("kl_factor"), "old.json")
    assert "differs" not in statuses("old.json", code=0).values()


def test_a_hand_written_plan_is_checked_as_far_as_it_speaks(folder: Path) -> None:
    edit(
        PLAN, lambda plan: [plan.pop(key) for key in ("budget", "solver", "provenance", "kvprof_version")], "hand.json"
    )
    found = statuses("hand.json", code=0)
    assert set(found.values()) == {"unknown"}


def test_scores_of_another_model_differ(folder: Path) -> None:
    random_scores(LAYERS, 4, fingerprint="sha256:two").save("other.json")
    found = statuses(PLAN, "--scores", "other.json", code=4)
    assert (found["scores"], found["model of the scores"]) == ("differs", "differs")
    assert found["formats"] == "unknown"


@pytest.mark.parametrize(
    "command",
    [
        "kvprof allocate --budget 3 --evil",
        "kvprof allocate --budget 3; rm -rf /",
        "kvprof allocate --budget 3 extra",
        "kvprof allocate --bud 3",
        "kvprof allocate --batch two",
        "kvprof allocate 'unclosed",
        "kvprof import plan.yaml",
        "kvprof.allocate(scores, budget=__import__('os').getcwd())",
        "kvprof.allocate(scores, evil=1)",
        "kvprof.allocate(scores, bits='three')",
        "kvprof.allocate(scores, bits=([],))",
        "kvprof.allocate(scores, pin=7)",
        "kvprof.allocate(*scores)",
        "kvprof.allocate(scores, **{'budget': 3})",
        "kvprof.allocate(scores, budget=3) or 1",
        "kvprof.allocate(" + "(" * 5000,
        "",
    ],
)
def test_a_command_that_is_none_of_ours_is_not_obeyed(folder: Path, command: str) -> None:
    edit(PLAN, lambda plan: plan["provenance"].update(command=command), "odd.json")
    found = checks("odd.json", code=0)
    assert found["command"]["status"] == "unknown"
    assert {found[name]["status"] for name in SOLVED} == {"holds"}
    edit(PLAN, lambda plan: plan["provenance"].update(command=command, request=None), "odd.json")
    found = checks("odd.json", code=0)
    assert {found[name]["status"] for name in SOLVED} == {"unknown"}
    assert all(found[name]["note"] for name in SOLVED)
    assert found["objective"]["status"] == "holds"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("none.json",), 1, "no such file"),
        ((SCORES,), 1, "kvprof.plan/1"),
        ((PLAN, "--scores", "none.json"), 1, "no such file"),
        ((PLAN, "--measure"), 2, "--model"),
        ((PLAN, "--model", "./none"), 1, "no such folder"),
    ],
)
def test_a_bad_request_is_one_message_and_its_exit_code(
    folder: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    done = run("verify", *words)
    assert done.exit_code == code
    assert said in done.output
    assert "Traceback" not in done.output


def test_no_torch_is_imported_where_no_model_is_named(folder: Path) -> None:
    code = f"""
import sys
sys.argv = ["kvprof", "verify", {PLAN!r}]
from kvprof.__main__ import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
found = [name for name in ("torch", "transformers", "datasets", "scipy") if name in sys.modules]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# With the model


TEXT = ("--data", "text.txt", "--sequences", "3", "--sequence-length", "48", "--pack")
DECODER = (
    "--sink-tokens",
    "0",
    "--recent-tokens",
    "8",
    "--formats",
    "key:int2g16,key:int4g16,value:int2g8,value:int4g8",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, the text that it was measured on, its scores and a plan."""
    folder, before = tmp_path_factory.mktemp("made"), Path.cwd()
    os.chdir(folder)
    try:
        save_folder(Path("model"))
        save_text(Path("text.txt"))
        assert run("gradients", "./model", *TEXT, *DECODER, "--out", "out").exit_code == 0
        assert run("allocate", "--budget", "6", "--scores", "out/gradients.json", "--out", "out").exit_code == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def measured(made: Path, in_tmp: Path) -> Path:
    """A copy of that folder, to be damaged."""
    shutil.copytree(made, in_tmp, dirs_exist_ok=True)
    return in_tmp


def test_model_text_and_libraries_hold_and_measuring_again_gives_the_same(measured: Path) -> None:
    found = checks("out/plan-6.00.json", "--model", "./model", "--measure", code=0)
    assert {check["status"] for check in found.values()} == {"holds"}
    assert {"model", "calibration text", "torch of the scores", "scores measured again", "formats by them"} < {*found}


def test_norms_are_measured_again_too(measured: Path) -> None:
    assert run("norms", "./model", "--out", "out").exit_code == 0
    assert run("allocate", "--budget", "3", "--scores", "out/norms.json", "--out", "by-norm.json").exit_code == 0
    found = checks("by-norm.json", "--model", "./model", "--measure", code=0)
    assert found["scores measured again"]["status"] == "holds"
    assert found["calibration text"]["note"] == "scores by norms read no text"


def test_another_text_differs_and_so_does_what_is_measured_on_it(measured: Path) -> None:
    Path("text.txt").write_text(Path("text.txt").read_text().replace("cat", "mat"))
    found = statuses("out/plan-6.00.json", "--model", "./model", "--measure", code=4)
    assert found["calibration text"] == "differs"
    assert found["scores measured again"] == "differs"
    assert found["model"] == "holds"


def test_a_text_that_is_gone_cannot_be_checked(measured: Path) -> None:
    Path("text.txt").unlink()
    found = checks("out/plan-6.00.json", "--model", "./model", code=0)
    assert found["calibration text"]["status"] == "unknown"


def test_weights_trained_since_differ(measured: Path) -> None:
    def negate(state: dict[str, Any]) -> None:
        state["model.layers.0.self_attn.k_proj.weight"].neg_()

    edit_weights(Path("model"), negate)
    assert statuses("out/plan-6.00.json", "--model", "./model", code=4)["model"] == "differs"


def test_a_model_of_another_shape_differs(measured: Path) -> None:
    save_folder(Path("wider"), "bamba")
    found = checks("out/plan-6.00.json", "--model", "./wider", code=4)
    assert found["model"]["status"] == "differs"
    assert found["model"]["note"]


def test_without_its_scores_a_plan_is_held_against_its_model(measured: Path) -> None:
    Path("out/gradients.json").unlink()
    assert "differs" not in statuses("out/plan-6.00.json", "--model", "./model", code=0).values()
    for part, change in {"dtype": {"dtype": "float16"}, "architecture": {"architecture": "Other"}}.items():
        where = "geometry" if part == "dtype" else "model"
        edit("out/plan-6.00.json", lambda plan, where=where, change=change: plan[where].update(change), "altered.json")
        found = statuses("altered.json", "--model", "./model", code=4)
        named = {"dtype": "cache of the model", "architecture": "architecture of the model"}[part]
        assert {name for name, status in found.items() if status == "differs"} == {named}


def test_a_plan_of_before_requests_is_solved_again_by_its_command(folder: Path) -> None:
    edit(PLAN, lambda plan: plan["provenance"].pop("request"), "older.json")
    found = statuses("older.json", code=0)
    assert [found[name] for name in SOLVED] == ["holds"] * 4
    assert "command" not in found
