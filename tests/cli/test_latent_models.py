"""A model of latent attention (MLA) through the commands: what stands for K and V is said, files name it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import save_folder, save_text
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from kvprof import BitPlan, Scores
from kvprof.cli.app import app

TEXT = ("--data", "text.txt", "--pack", "--sequences", "3", "--sequence-length", "60")
WINDOW = ("--sink-tokens", "2", "--recent-tokens", "8")


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def said(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture
def model(in_tmp: Path) -> str:
    """A DeepSeek-V3.2: latents, and an indexer beside them."""
    save_text(in_tmp / "text.txt", rows=60)
    save_folder(in_tmp / "model", "deepseek-v32")
    return "./model"


@pytest.fixture
def scores(model: str) -> str:
    formats = ("--formats", "latent:int2g8,latent:int4g8,latent:rot3,rope:int4g8,rope:int8g8")
    assert run("gradients", model, *formats, *TEXT, *WINDOW, "--out", "out").exit_code == 0
    return "out/gradients.json"


def test_inspect_counts_the_latent_its_rotary_part_and_the_indexer(model: str) -> None:
    result = said(run("inspect", model))
    assert "each token adds 224 bytes (224 B) in 2 of 2 layers" in result  # 2 layers x (16 + 4 + 8) x 4
    assert "layers 0-1: latent attention (MLA): K is the latent, V the rotary part of the keys" in result
    assert "layers 0-1: an indexer caches 8 numbers a token more, in full precision in any plan" in result


def test_norms_are_those_of_the_matrix_that_makes_the_latent(model: str) -> None:
    result = run("norms", model, "--out", "out")
    assert result.exit_code == 0
    weights = load_file("model/model.safetensors")
    document = json.loads(Path("out/norms.json").read_text())
    for entry in document["layers"]:
        matrix = weights[f"model.layers.{entry['layer']}.self_attn.kv_a_proj_with_mqa.weight"].double()
        for name, part in (("latent", matrix[:16]), ("rope", matrix[16:])):
            assert entry[name]["frobenius_norm"] == pytest.approx(float(part.norm()), rel=1e-6)
            assert entry[name]["spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(part, 2)), rel=1e-6)
    assert "key-value norm disparity" not in said(result)
    assert "K is the latent, V the rotary part" in said(result)


def test_scores_and_plans_name_both_parts(scores: str) -> None:
    document = json.loads(Path(scores).read_text())
    assert [sorted(entry) for entry in document["layers"]] == [["latent", "layer", "rope"]] * 2
    assert list(document["layers"][0]["latent"]["loss_increase"]) == ["int2g8", "int4g8", "rot3"]
    assert list(document["layers"][0]["rope"]["loss_increase"]) == ["int4g8", "int8g8"]
    result = run("allocate", "--scores", scores, "--budget", "7", "--out", "plan.json")
    assert result.exit_code == 0
    assert "K is the latent, V the rotary part of the keys" in said(result)
    plan: dict[str, Any] = json.loads(Path("plan.json").read_text())
    assert [sorted(entry) for entry in plan["layers"]] == [["latent", "layer", "rope"]] * 2
    assert {entry["rope"]["axis"] for entry in plan["layers"]} == {"channel"}  # a part of the keys
    stored = sum(16 * bits_of(entry["latent"], 16) + 4 * bits_of(entry["rope"], 4) for entry in plan["layers"])
    assert plan["budget"]["stored_bits"] == pytest.approx(stored / 40)
    assert plan["budget"]["bytes_per_token"] == pytest.approx(stored / 8 + 2 * 8 * 4)  # the indexer's keys beside
    assert run("verify", "plan.json", "--scores", scores).exit_code == 0
    loaded = BitPlan.load("plan.json")
    assert loaded.layers[0].key is loaded.layers[0].latent


def bits_of(entry: dict[str, Any], channels: int) -> float:
    return entry["bits"] + (16 / channels if entry["scheme"] == "rotated" else 32 / entry["group_size"])


def test_evaluate_in_one_forward_is_evaluate_exact(scores: str) -> None:
    run("allocate", "--scores", scores, "--budget", "7", "--out", "plan.json")
    measured = []
    for extra in ((), ("--exact",)):
        options = ("--model", "./model", "--no-rivals", *TEXT, "--out", f"out{len(extra)}")
        assert run("evaluate", "plan.json", *options, *extra).exit_code == 0
        measured.append(json.loads(Path(f"out{len(extra)}/evaluation.json").read_text()))
    fast, exact = (document["plans"][0]["kl_nats"] for document in measured)
    assert fast == pytest.approx(exact, rel=1e-3)
    assert fast > 0


def test_a_limit_in_bytes_counts_the_indexer(scores: str) -> None:
    result = run("allocate", "--scores", scores, "--memory", "27000B", "--context", "256", "--out", "plan.json")
    assert result.exit_code == 0
    plan = BitPlan.load("plan.json")
    assert 25_000 < plan.bytes_at(256) <= 27_000
    least = 2 * 256 * 8 * 4  # what no plan makes smaller
    result = run("allocate", "--scores", scores, "--memory", f"{least}B", "--context", "256", "--out", "none.json")
    assert result.exit_code == 3
    assert not Path("none.json").exists()


def test_a_part_is_pinned_by_its_own_name(scores: str) -> None:
    options = ("--scores", scores, "--budget", "8", "--pin", "latent:0=int4g8", "--pin", "rope:*=int8g8")
    result = run("allocate", *options, "--out", "plan.json")
    assert result.exit_code == 0, result.output
    plan = BitPlan.load("plan.json")
    assert (plan.layers[0].key.name, {entry.value.name for entry in plan.layers}) == ("int4g8", {"int8g8"})


def test_no_other_runtime_is_told_of_latents(scores: str) -> None:
    result = run("allocate", "--scores", scores, "--budget", "7", "--target", "vllm", "--out", "plan.json")
    assert result.exit_code == 2
    assert "kvprof does not know how vllm stores a latent" in said(result)
    run("allocate", "--scores", scores, "--budget", "7", "--out", "plan.json")
    result = run("export", "plan.json", "--to", "llama.cpp")
    assert result.exit_code != 0
    assert "kvprof does not know how llama.cpp stores a latent" in said(result)
    assert run("export", "plan.json", "--to", "transformers").exit_code == 0


def test_a_timing_of_attention_to_latents_is_refused(scores: str) -> None:
    run("allocate", "--scores", scores, "--budget", "7", "--out", "plan.json")
    result = run("benchmark", "plan.json", "./model", "--out", "out")
    assert result.exit_code == 2
    assert "latent attention (MLA)" in said(result)


def test_a_stopped_run_of_norms_goes_on(model: str) -> None:
    run("norms", model, "--out", "out")
    first = Scores.load("out/norms.json")
    again = run("norms", model, "--out", "out")
    assert again.exit_code == 0
    assert Scores.load("out/norms.json").layers == first.layers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": {"bits": 4, "group_size": 8, "axis": "token"}}, "unknown key layers[0].key"),
        ({"rope": None}, "layers[0].rope"),
        ({"latent": {"bits": 4, "group_size": 8, "axis": "channel", "scheme": "rot"}}, "layers[0].latent.scheme"),
    ],
)
def test_a_plan_that_is_not_right_says_where(scores: str, change: dict[str, Any], words: str) -> None:
    run("allocate", "--scores", scores, "--budget", "7", "--out", "plan.json")
    plan = json.loads(Path("plan.json").read_text())
    plan["layers"][0] |= change
    Path("plan.json").write_text(json.dumps(plan))
    result = run("show", "plan.json")
    assert result.exit_code == 1
    assert words in said(result)


def test_two_shards_merge_to_what_one_run_measures(scores: str) -> None:
    formats = ("--formats", "latent:int2g8,latent:int4g8,latent:rot3,rope:int4g8,rope:int8g8")
    for shard in ("1/2", "2/2"):
        assert run("gradients", "./model", *formats, *TEXT, *WINDOW, "--shard", shard, "--out", "parts").exit_code == 0
    parts = sorted(map(str, Path("parts").glob("gradients-*.json")))
    assert run("merge", *parts, "--out", "merged").exit_code == 0
    assert Scores.load("merged/gradients.json").layers == Scores.load(scores).layers


def test_scores_for_a_runtime_that_stores_no_latents_are_not_measured(model: str) -> None:
    result = run("gradients", model, *TEXT, "--target", "vllm", "--out", "out")
    assert result.exit_code == 2
    assert "kvprof does not know how vllm stores a latent" in said(result)
    assert not Path("out/gradients.json").exists()


def test_a_plan_of_another_indexer_does_not_fit(scores: str) -> None:
    run("allocate", "--scores", scores, "--budget", "7", "--out", "plan.json")
    plan = json.loads(Path("plan.json").read_text())
    plan["geometry"]["layers"][0]["indexer_width"] = 99
    Path("plan.json").write_text(json.dumps(plan))
    result = run("validate", "plan.json", "./model")
    assert result.exit_code == 4
    assert "an indexer of 99" in said(result)


def test_what_the_indexer_selects_is_said_not_to_be_predicted(scores: str) -> None:
    assert "rounding changes the selection" in said(run("show", scores))
    allocated = run("allocate", "--scores", scores, "--budget", "7", "--out", "plan.json")
    assert "rounding changes the selection" in said(allocated)


def test_plans_are_explained_and_compared_in_the_words_of_latents(scores: str) -> None:
    for budget in ("6", "8"):
        assert run("allocate", "--scores", scores, "--budget", budget, "--out", f"plan-{budget}.json").exit_code == 0
    result = run("explain", "plan-6.json", "--layer", "0", "--scores", scores)
    assert "the latent of layer 0 has" in said(result)
    assert "the rope of layer 0 has" in said(result)
    alone = said(run("explain", "plan-6.json", "--layer", "0", "--tensor", "rope", "--scores", scores))
    assert "the rope of layer 0 has" in alone
    assert "the latent of layer 0" not in alone
    result = run("explain", "plan-6.json", "--layer", "0", "--tensor", "key", "--scores", scores)
    assert result.exit_code == 2
    assert "no tensor is called 'key': choose from latent, rope" in said(result)
    result = run("diff", "plan-6.json", "plan-8.json", "--json")
    assert {change["tensor"] for change in json.loads(result.stdout)["changes"]} <= {"latent", "rope"}
    assert "per channel" not in run("diff", "plan-6.json", "plan-8.json").output  # the usual axis of both parts


def test_a_report_says_how_to_read_it_for_latents(scores: str) -> None:
    assert run("allocate", "--scores", scores, "--budget", "7", "--out", "out/plan.json").exit_code == 0
    assert run("report", "out").exit_code == 0
    assert "what this report says of keys (K) is of the latents that it caches" in Path("out/report.md").read_text()


def test_what_no_query_reads_is_named_as_it_is(model: str) -> None:
    text = ("--data", "text.txt", "--pack", "--sequences", "2", "--sequence-length", "40")
    formats = ("--formats", "latent:int4g8,latent:int4g16,rope:int4g8,rope:rot4")
    result = run("gradients", model, *formats, *text, "--sink-tokens", "2", "--recent-tokens", "28", "--out", "out")
    assert result.exit_code == 0
    assert "not predicted: latents in int4g16: no group of 40 tokens leaves the window" in said(result)
