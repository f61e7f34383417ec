"""explain and diff as a user types them, and what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from score_factories import geometry_json, plan_of, random_scores
from test_commands import handmade_scores, run

from kvprof import BitPlan
from kvprof.allocate.budget import bit_limit
from kvprof.allocate.methods import exact
from kvprof.analysis.stability import stability
from kvprof.report.plans import stability_lines

LAYERS = 6


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """Scores in outputs/, and three plans: the best by them, one by hand, and one for another model."""
    scores = random_scores(LAYERS, 4, factor=1.5)
    scores.save("outputs/handmade/gradients.json")
    exact(scores, bit_limit("3", "stored")).save("best.json")
    plan_of([("int3g64", "rot2")] * LAYERS).save("hand.json")
    plan_of([("int3g64", "rot2")] * LAYERS, geometry=geometry_json(LAYERS, kv_heads=8)).save("other.json")
    return in_tmp


def said(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


# explain


def test_explain_finds_the_scores_and_says_why(folder: Path) -> None:
    output = said("explain", "best.json", "--layer", "3")
    assert "shadow price: one more stored bit an element" in output
    assert "the calibrated factor 1.5 in it" in output
    for tensor in ("key", "value"):
        assert f"the {tensor} of layer 3 has " in output
        assert output.count("▶") >= 2
    assert "layer 2" not in output
    assert "so it stays" in output


def test_explain_takes_several_layers_and_one_tensor(folder: Path) -> None:
    output = said("explain", "best.json", "--layer", "1-2", "--layer", "5", "--tensor", "key")
    assert [layer for layer in range(LAYERS) if f"the key of layer {layer} has" in output] == [1, 2, 5]
    assert "the value of layer" not in output


def test_explain_gives_the_same_numbers_as_json(folder: Path) -> None:
    found = json.loads(said("explain", "best.json", "--layer", "0", "--json"))
    assert [tensor["tensor"] for tensor in found["tensors"]] == ["key", "value"]
    assert found["loss"] == pytest.approx(json.loads(Path("best.json").read_text())["solver"]["predicted_kl_nats"])
    assert all(sum(offer["chosen"] for offer in tensor["offers"]) == 1 for tensor in found["tensors"])


def test_explain_by_named_scores_and_formats(folder: Path) -> None:
    output = said(
        "explain", "hand.json", "--layer", "0", "--scores", "outputs/handmade/gradients.json",
        "--formats", "key:int2g64c,key:int4g64,value:rot3",
    )  # fmt: skip
    assert "int4g64" in output
    assert "rot4" not in output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("best.json", "--layer", "6"), 2, ["layer 6 does not exist", "layers 0-5"]),
        (("best.json", "--layer", "x"), 2, ["'x'"]),
        (("best.json",), 2, ["--layer"]),
        (("best.json", "--layer", "0", "--tensor", "keys"), 2, ["did you mean 'key'?"]),
        (("best.json", "--layer", "0", "--metric", "loss_incr"), 2, ["did you mean 'loss_increase'?"]),
        (("best.json", "--layer", "0", "--metric", "spectral_norm"), 1, ["no spectral_norm"]),
        (("best.json", "--layer", "0", "--formats", "int9g64"), 2, ["int9g64"]),
        (("hand.json", "--layer", "0"), 1, ["does not say which scores", "--scores FILE"]),
        (("other.json", "--layer", "0", "--scores", "outputs/handmade/gradients.json"), 4, ["KV heads"]),
        (("nothing.json", "--layer", "0"), 1, ["nothing.json", "no such file"]),
        (("outputs/handmade/gradients.json", "--layer", "0"), 1, ["kvprof.plan/1"]),
    ],
)
def test_a_bad_request_is_one_message_and_its_exit_code(
    folder: Path, arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    result = run("explain", *arguments)
    assert result.exit_code == code, result.output
    output = " ".join(result.output.split())
    for word in words:
        assert word in output
    assert "Traceback" not in output


def test_a_plan_whose_scores_are_gone_says_what_to_do(folder: Path) -> None:
    Path("outputs/handmade/gradients.json").unlink()
    result = run("explain", "best.json", "--layer", "0")
    assert result.exit_code == 1
    assert "--scores FILE" in result.output


def test_a_plan_by_a_norm_is_explained_without_nats(in_tmp: Path) -> None:
    scores = handmade_scores(in_tmp / "mine.json")
    assert run("allocate", "--budget", "3", "--scores", scores, "--out", in_tmp / "plan.json").exit_code == 0
    output = said("explain", "plan.json", "--layer", "2")
    assert "by spectral_norm" in output
    assert "nats" not in output


# diff


def test_diff_says_which_tensors_moved_and_what_it_costs(folder: Path) -> None:
    output = said("diff", "best.json", "hand.json", "--scores", "outputs/handmade/gradients.json")
    assert "of 12 tensors moved" in output
    for row in ("stored bits an element", "bytes at 32k context", "predicted KL", "its standard error"):
        assert row in output


def test_diff_of_equal_plans_says_so(folder: Path) -> None:
    assert "both plans store the same" in said("diff", "best.json", "best.json")


def test_diff_gives_the_same_numbers_as_json(folder: Path) -> None:
    found = json.loads(said("diff", "best.json", "hand.json", "--json"))
    assert found["second"]["bytes_per_token"] == LAYERS * 192 * (3.5 + 2.25) / 8
    assert found["same"] is False
    assert {change["direction"] for change in found["changes"]} <= {"up", "down", "level"}


def test_diff_predicts_both_plans_from_the_scores_that_they_were_made_from(folder: Path) -> None:
    def predicted() -> list[float]:
        found = json.loads(said("diff", "best.json", "hand.json", "--json"))
        return [found[side]["predicted_kl_nats"] for side in ("first", "second")]

    scores = Path("outputs/handmade/gradients.json")
    value = json.loads(scores.read_text())
    sums = [
        1.5
        * sum(
            layer[tensor]["loss_increase"][getattr(entry, tensor).name]
            for layer, entry in zip(value["layers"], BitPlan.load(path).layers, strict=True)
            for tensor in ("key", "value")
        )
        for path in ("best.json", "hand.json")
    ]
    assert predicted() == pytest.approx(sums)
    value["kl_calibration"]["factor"] = 3
    scores.write_text(json.dumps(value))  # calibrated since: both are predicted as the scores would now
    assert predicted() == pytest.approx([2 * total for total in sums])
    scores.unlink()
    assert predicted() == [pytest.approx(sums[0]), None]


def test_diff_tells_a_changed_setting(folder: Path) -> None:
    value = json.loads(Path("best.json").read_text())
    value["window"]["sink_tokens"] = 0
    Path("edited.json").write_text(json.dumps(value))
    output = said("diff", "best.json", "edited.json")
    assert "no tensor moved" in output
    assert "window.sink_tokens: 4 -> 0" in output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("best.json", "other.json"), 4, "not of one model"),
        (("best.json", "nothing.json"), 1, "no such file"),
        (("best.json",), 2, "Missing argument"),
        (("best.json", "hand.json", "--scores", "nothing.json"), 1, "no such file"),
        (("best.json", "outputs/handmade/gradients.json"), 1, "kvprof.plan/1"),
    ],
)
def test_diff_refuses_what_cannot_be_compared(folder: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    result = run("diff", *arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())


# What is printed, and by whom


def test_every_table_fits_eighty_columns(folder: Path) -> None:
    outputs = [
        said("explain", "best.json", "--layer", "0-5"),
        said("diff", "best.json", "hand.json", "--scores", "outputs/handmade/gradients.json"),
    ]
    rows = [line for output in outputs for line in output.splitlines() if line.startswith(" ")]
    assert len(rows) > 50
    assert max(map(len, rows)) <= 80


def test_stability_is_told_in_a_sentence_where_it_is_known(folder: Path) -> None:
    scores = random_scores(LAYERS, 4, factor=1.5)
    found = stability(scores, exact(scores, bit_limit("3", "stored")))
    assert found is not None
    (line,) = stability_lines(found)
    assert f"of {2 * LAYERS} tensors" in line
    assert stability_lines(None) == []


@pytest.mark.parametrize(
    "arguments", [["explain", "best.json", "--layer", "0"], ["diff", "best.json", "hand.json"]], ids=["explain", "diff"]
)
def test_no_torch_is_imported(folder: Path, arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["kvprof", *{arguments!r}]
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
