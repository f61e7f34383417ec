"""The three commands and their companions, as a user types them, in a folder of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model
from typer.testing import CliRunner, Result

from kvprof import BitPlan, Scores
from kvprof.cli.app import app


def run(*arguments: str | Path) -> Result:
    """Run a command in this process; an exception that is no exit is a failure."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def handmade_scores(path: Path, keys: tuple[float, ...] = (8, 7, 6, 5)) -> Path:
    """Write a Scores file as a person would: schema and layers, nothing else."""
    layers = [
        {"layer": n, "key": {"spectral_norm": key}, "value": {"spectral_norm": 2 + n}} for n, key in enumerate(keys)
    ]
    path.write_text(json.dumps({"schema": "kvprof.scores/1", "layers": layers}))
    return path


@pytest.mark.demo
def test_the_three_commands_of_the_readme_make_a_plan_for_the_demo_model(in_tmp: Path) -> None:
    assert run("norms").exit_code == 0
    result = run("gradients", "--sequences", "2", "--sequence-length", "32")
    assert result.exit_code == 0, result.output
    result = run("allocate", "--budget", "2.5")
    assert result.exit_code == 0, result.output
    plan = BitPlan.load("outputs/demo/plan-2.50.json")
    assert plan.budget is not None
    assert plan.budget.nominal_bits is not None
    assert plan.budget.nominal_bits <= 2.5
    assert plan.budget.bytes_per_token == 30 * 2 * 192 * (plan.budget.stored_bits or 0) / 8
    assert plan.solver is not None
    assert plan.solver.metric == "gradient_norm"  # the newest scores
    assert plan.provenance is not None
    assert plan.provenance.scores == Scores.load("outputs/demo/gradients.json").digest
    assert run("validate", "outputs/demo/plan-2.50.json", "demo").exit_code == 0


@pytest.mark.demo
def test_norms_says_that_the_disparity_is_not_universal(in_tmp: Path) -> None:
    result = run("norms")
    assert "spectral K > V in 29 of 30 layers" in result.output
    assert "Frobenius K > V in 19 of 30" in " ".join(result.output.split())
    assert "not universal" in " ".join(result.output.split())


@pytest.mark.demo
def test_inspect_tells_bytes_per_token_and_per_context(in_tmp: Path) -> None:
    output = run("inspect").output
    assert "46080 bytes" in output  # 30 layers x (192 + 192) x 4 bytes
    assert "4k context: 180.00 MiB  8k context: 360.00 MiB\n" in output  # and no more: it was made for 8,192
    inventory = json.loads(run("inspect", "--json").output)
    assert len(inventory["geometry"]["layers"]) == 30
    assert inventory["geometry"]["layers"][7]["key_head_dim"] == 64


def test_every_table_fits_eighty_columns(in_tmp: Path) -> None:
    tiny_model("gemma3").save_pretrained("model")
    outputs = [run("inspect", "./model").output, run("norms", "./model").output]
    scores = next(Path("outputs").glob("*/norms.json"))
    outputs.append(run("allocate", "--budget", "3", "--scores", scores).output)
    outputs.append(run("show", scores).output)
    rows = [line for output in outputs for line in output.splitlines() if line.startswith(" ")]
    assert len(rows) > 20
    assert max(map(len, rows)) <= 80


@pytest.mark.parametrize(
    ("words", "layers", "reasons"),
    [
        ((), [1], ["sliding window of 16 tokens, no more than stay in full precision"]),
        (("--recent-tokens", "15"), [0, 1], []),
        (("--recent-tokens", "15", "--layers", "full"), [1], ["sliding window of 16 tokens"]),
    ],
    ids=["128 recent tokens", "15 recent tokens", "full layers"],
)
def test_a_layer_with_a_sliding_window_is_planned_where_something_of_it_would_be_quantized(
    in_tmp: Path, words: tuple[str, ...], layers: list[int], reasons: list[str]
) -> None:
    tiny_model("gemma3").save_pretrained("model")
    assert "sliding 16" in run("inspect", "./model").output
    assert "key_norm" in run("norms", "./model").output
    assert run("allocate", "--budget", "3", *words).exit_code == 0
    plan = BitPlan.load(next(Path("outputs").glob("*/plan-3.00.json")))
    assert [entry.layer for entry in plan.layers] == layers
    assert [entry.reason for entry in plan.skipped or ()] == reasons


def test_handmade_scores_are_allocated_with_keys_and_values_equally_wide(in_tmp: Path) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    result = run("allocate", "--budget", "3", "--scores", scores, "--out", in_tmp / "plan.json")
    assert result.exit_code == 0, result.output
    plan = BitPlan.load(in_tmp / "plan.json")
    bits = [entry.tensor(tensor).bits for entry in plan.layers for tensor in ("key", "value")]
    assert sum(bits) <= 3 * 8
    assert plan.budget is not None
    assert plan.budget.bytes_per_token is None


def test_a_pin_is_kept_and_paid_for(in_tmp: Path) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    assert run("allocate", "--budget", "3", "--pin", "key:0=8", "--scores", scores, "--out", "p").exit_code == 0
    plan = BitPlan.load("p/plan-3.00.json")
    assert plan.layers[0].key.bits == 8
    assert plan.budget is not None
    assert plan.budget.nominal_bits is not None
    assert plan.budget.nominal_bits <= 3


def test_window_options_reach_the_plan(in_tmp: Path) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    command = ("allocate", "--budget", "3", "--scores", scores, "--recent-tokens", "32", "--sink-tokens", "0")
    assert run(*command, "--out", "plan.json").exit_code == 0
    window = BitPlan.load("plan.json").window
    assert (window.sink_tokens, window.recent_tokens) == (0, 32)


def test_the_same_scores_give_the_same_plan_to_the_byte(in_tmp: Path) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    texts = []
    for _ in range(2):
        assert run("allocate", "--budget", "3", "--scores", scores, "--out", "plan.json").exit_code == 0
        texts.append(Path("plan.json").read_bytes())
    assert texts[0] == texts[1]


def test_a_flat_metric_is_said_to_carry_no_information(in_tmp: Path) -> None:
    scores = handmade_scores(in_tmp / "flat.json", keys=(5.0, 5.01, 5.0))
    for command in (("show", scores), ("allocate", "--budget", "3", "--scores", scores)):
        output = " ".join(run(*command).output.split())
        assert "spectral_norm of the keys varies by less than 1 %" in output
        assert "of the values" not in output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--budget", "0.5"), 3, ["below", "cheapest plan", "try --budget 1"]),
        (("--budget", "99"), 3, ["above", "dearest", "try --budget 8"]),
        (("--budget", "3", "--metric", "spectral_nrm"), 2, ["did you mean 'spectral_norm'?"]),
        (("--budget", "3", "--metric", "gradient_norm"), 1, ["no gradient_norm", "kvprof gradients"]),
        (("--budget", "3", "--rule", "exct"), 2, ["did you mean 'exact'?"]),
        (("--budget", "3", "--unit", "nominl"), 2, ["did you mean 'nominal'?"]),
        (("--budget", "3", "--bits", "2,7"), 2, ["'7'", "1, 2, 3, 4, 5, 6, 8, 16"]),
        (("--budget", "3", "--pin", "kye:0=8"), 2, ["did you mean 'key'?"]),
        (("--budget", "three"), 2, ["three"]),
        (("--budget", "3", "--group-size", "0"), 2, ["group-size"]),
        ((), 2, ["--budget 2.5", "--memory"]),
        (("--memory", "1GiB", "--context", "4096"), 2, ["geometry"]),
        (("--rule", "uniform", "--bits-key", "4"), 2, ["--bits-value"]),
    ],
)
def test_a_bad_request_is_one_message_and_its_exit_code(
    in_tmp: Path, arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    result = run("allocate", *arguments, "--scores", scores, "--out", "plan.json")
    assert result.exit_code == code, result.output
    said = " ".join(result.output.split())
    for word in words:
        assert word in said
    assert "Traceback" not in said
    assert not Path("plan.json").exists()


def test_allocate_without_any_scores_says_what_to_run(in_tmp: Path) -> None:
    result = run("allocate", "--budget", "2.5")
    assert result.exit_code == 1
    assert "kvprof norms" in result.output


def test_a_rule_that_takes_no_budget_refuses_one_and_says_so(in_tmp: Path) -> None:
    result = run("allocate", "--rule", "kvmix", "--budget", "2.5", "--scores", handmade_scores(in_tmp / "mine.json"))
    assert result.exit_code == 2
    assert "kvmix takes no --budget" in result.output


def test_sinks_are_refused_where_a_rule_is_wanted_as_published(in_tmp: Path) -> None:
    source = handmade_scores(in_tmp / "mine.json")
    options = ["--rule", "norm-greedy", "--as-published", "--budget", "2", "--scores", source, "--out", "plan.json"]
    result = run("allocate", *options, "--sink-tokens", "4")
    assert result.exit_code == 2
    assert "--as-published has no sinks" in result.output
    assert not (in_tmp / "plan.json").exists()
    assert run("allocate", *options).exit_code == 0
    assert json.loads((in_tmp / "plan.json").read_text())["window"] == {"sink_tokens": 0, "recent_tokens": 128}


def test_a_misspelt_command_and_option_name_the_nearest(in_tmp: Path) -> None:
    assert "norms" in run("nroms").output
    assert "--budget" in run("allocate", "--budgt", "2").output


@pytest.mark.parametrize("command", ["norms", "gradients"])
def test_an_unwritable_output_folder_is_refused_before_the_work(in_tmp: Path, command: str) -> None:
    Path("file").write_text("in the way")
    result = run(command, "--out", "file/below")
    assert result.exit_code == 1
    assert "cannot write" in result.output
    assert list(in_tmp.iterdir()) == [in_tmp / "file"]


def test_a_plan_for_another_model_exits_with_four(in_tmp: Path) -> None:
    for name in ("llama", "llama-mha"):
        tiny_model(name).save_pretrained(name)
    assert run("norms", "./llama").exit_code == 0
    assert run("allocate", "--budget", "3", "--out", "plan.json").exit_code == 0
    assert run("validate", "plan.json", "./llama").exit_code == 0
    for file in ("plan.json", next(Path("outputs").glob("*/norms.json"))):
        result = run("validate", file, "./llama-mha")
        assert result.exit_code == 4
        assert "KV heads" in result.output


def test_a_plan_for_the_same_shapes_but_other_weights_exits_with_four(in_tmp: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained("before")
    model.model.layers[1].self_attn.v_proj.weight.neg_()
    model.save_pretrained("after")
    assert run("norms", "./before").exit_code == 0
    assert run("allocate", "--budget", "3", "--out", "plan.json").exit_code == 0
    result = run("validate", "plan.json", "./after")
    assert result.exit_code == 4
    assert "fingerprint" in result.output


def test_schema_prints_a_json_schema_that_the_files_meet(in_tmp: Path) -> None:
    for kind, title in (("scores", "Scores"), ("plan", "BitPlan")):
        assert json.loads(run("schema", kind).output)["title"] == title
    assert run("schema", "plann").exit_code == 2


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"schema": "kvprof.plan/9"}', '{"schema": 3}', "\x00"])
def test_validate_says_what_is_wrong_with_a_file(in_tmp: Path, text: str) -> None:
    Path("file.json").write_text(text)
    for command in ("validate", "show"):
        result = run(command, "file.json")
        assert result.exit_code == 1
        assert "file.json" in result.output
        assert "Traceback" not in result.output


def test_the_newest_scores_that_can_be_allocated_are_taken_whatever_lies_beside_them(in_tmp: Path) -> None:
    for folder in "abcde":
        Path("outputs", folder).mkdir(parents=True)
    handmade_scores(Path("outputs/a/norms.json"))
    Path("outputs/b/norms.json").write_text("{")
    losses = [{"layer": 0, "key": {"loss_increase": {"int2g32": 0.1}}, "value": {}}]  # a sample of the tensors
    Path("outputs/c/divergence.json").write_text(json.dumps({"schema": "kvprof.scores/1", "layers": losses}))
    Path("outputs/d/gradients.json").symlink_to("nowhere")
    Path("outputs/e/norms.json").mkdir()
    result = run("allocate", "--budget", "3")
    assert result.exit_code == 0, result.output
    assert "from outputs/a/norms.json" in result.output
    Path("outputs/a/norms.json").unlink()
    result = run("allocate", "--budget", "3")
    assert result.exit_code == 1
    assert "outputs/b/norms.json: not valid JSON" in result.output


def test_show_prints_every_metric_that_a_file_has(in_tmp: Path) -> None:
    tensor = {"gradient_norm": 0.25, "spectral_norm": 7.5, "loss_increase": {"int2g32": 0.125, "rot2": 0.0625}}
    layers = [{"layer": 0, "key": tensor, "value": tensor}]
    Path("all.json").write_text(json.dumps({"schema": "kvprof.scores/1", "layers": layers}))
    output = run("show", "all.json").output
    for number in ("0.2500", "7.500", "10^-3 nats", "int2g32", "125 ", "rot2", "62.5"):
        assert number in output


def test_a_metric_that_one_layer_lacks_is_named_with_the_layer(in_tmp: Path) -> None:
    layers = [{"layer": n, "key": {"spectral_norm": 1.0}, "value": {"spectral_norm": 1.0}} for n in range(2)]
    del layers[1]["key"]["spectral_norm"]
    Path("gap.json").write_text(json.dumps({"schema": "kvprof.scores/1", "layers": layers}))
    result = run("allocate", "--budget", "3", "--scores", "gap.json")
    assert result.exit_code == 1
    assert "no spectral_norm for the key of layer 1" in result.output


@pytest.mark.parametrize("option", ["--group-size", "--recent-tokens", "--sink-tokens"])
def test_an_absurd_number_is_a_usage_error(in_tmp: Path, option: str) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    assert run("allocate", "--budget", "3", option, str(10**20), "--scores", scores).exit_code == 2


def test_a_memory_budget_says_what_the_plan_holds_at_that_context_and_batch(in_tmp: Path) -> None:
    tiny_model("llama").save_pretrained("model")
    assert run("norms", "./model").exit_code == 0
    result = run("allocate", "--memory", "180KiB", "--context", "1000", "--batch", "2", "--out", "plan.json")
    assert result.exit_code == 0, result.output
    held = BitPlan.load("plan.json").bytes_at(1000, 2)
    assert held <= 180 * 1024
    assert f"{held} bytes" in result.output


def test_a_file_cannot_send_control_codes_to_the_terminal(in_tmp: Path) -> None:
    layers = [{"layer": 0, "key": {"spectral_norm": 1.0}, "value": {"spectral_norm": 1.0}}]
    model = {"id": "\x1b[31mred\u202e", "num_layers": 1}
    Path("red.json").write_text(json.dumps({"schema": "kvprof.scores/1", "model": model, "layers": layers}))
    output = run("show", "red.json").output
    assert "red" in output
    assert "\x1b" not in output
    assert "\u202e" not in output


def test_a_terminal_without_unicode_gets_a_table_and_no_traceback(in_tmp: Path) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    assert run("allocate", "--budget", "3", "--scores", scores, "--out", "plan.json").exit_code == 0
    done = subprocess.run(
        [sys.executable, "-m", "kvprof", "show", "plan.json"],
        env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "int" in done.stdout


def test_an_endless_device_is_no_file_of_kvprofs(in_tmp: Path) -> None:
    result = run("show", "/dev/zero")
    assert result.exit_code == 1
    assert "/dev/zero" in result.output


def test_plans_of_different_budgets_have_different_names(in_tmp: Path) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    for budget in ("2", "2.0000001", "2.5"):
        assert run("allocate", "--budget", budget, "--scores", scores, "--out", "plans").exit_code == 0
    pinned = ("--rule", "uniform", "--bits-key", "4", "--bits-value", "2", "--pin", "key:0=8")
    assert run("allocate", *pinned, "--scores", scores, "--out", "plans").exit_code == 0
    names = {path.name for path in Path("plans").iterdir()}
    assert names == {"plan-2.00.json", "plan-2.0000001.json", "plan-2.50.json", "plan-uniform-k4v2.json"}
