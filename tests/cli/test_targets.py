"""The commands for other runtimes: what can be planned for, a plan within it, and its artefact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import save_folder, save_text
from typer.testing import CliRunner, Result

from kvprof import BitPlan, Scores
from kvprof.cli.app import app
from kvprof.targets.registry import TARGETS
from kvprof.targets.versions import CHECKED

GGML = {"q8_0": 0.001, "q5_1": 0.02, "q5_0": 0.03, "q4_1": 0.06, "q4_0": 0.09}


def kvprof(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_scores(path: Path, layers: int = 6, **more: float) -> Path:
    """Write scores by hand: early layers matter most, keys ten times as much as values."""
    rows = []
    for layer in range(layers):
        weight = 1 / (1 + layer)
        value = {name: loss * weight for name, loss in (GGML | more).items()}
        rows.append(
            {
                "layer": layer,
                "key": {"loss_increase": {name: 10 * loss for name, loss in value.items()}},
                "value": {"loss_increase": value},
            }
        )
    path.write_text(json.dumps({"schema": "kvprof.scores/1", "layers": rows}))
    return path


def test_targets_are_listed_with_their_bits_and_what_was_checked() -> None:
    text = kvprof("targets").stdout
    for name, target in TARGETS.items():
        assert name in text
        assert target.checked in text
        version, date = CHECKED[name]
        assert f"checked: {version}, on {date}" in text
    assert set(CHECKED) == set(TARGETS)
    assert "q6_0 6.5" in text
    assert "NVFP4 4.5" in text


def test_a_plan_for_a_runtime_is_within_its_grammar_and_says_what_that_costs(here: Path) -> None:
    scores = save_scores(here / "scores.json")
    said = kvprof("allocate", "--target", "llama.cpp", "--budget", "5", "--scores", scores, "--out", "plan.json")
    plan = BitPlan.load("plan.json")
    assert plan.solver is not None
    assert plan.solver.target == "llama.cpp"
    assert {(entry.key.name, entry.value.name) for entry in plan.layers} == {("q5_0", "q4_0")}
    assert (plan.window.sink_tokens, plan.window.recent_tokens) == (0, 0)
    assert "price of the restriction" in said.stdout
    free = kvprof("allocate", "--target", "ik_llama.cpp", "--budget", "5", "--scores", scores, "--out", "ik.json")
    assert BitPlan.load("ik.json").solver.objective < plan.solver.objective
    assert "that ik_llama.cpp can be told" in free.stdout


def test_an_artefact_is_all_that_stands_on_stdout_and_lies_beside_the_plan(here: Path) -> None:
    scores = save_scores(here / "scores.json")
    kvprof("allocate", "--target", "llama.cpp", "--budget", "5", "--scores", scores, "--out", "plan.json")
    said = kvprof("export", "plan.json", "--to", "llama.cpp")
    assert said.stdout == "-fa on -ctk q5_0 -ctv q4_0\n"
    assert "GGML_CUDA_FA_ALL_QUANTS" in said.stderr
    assert (here / "plan.llama.cpp.args").read_text() == said.stdout
    kvprof("export", "plan.json", "--to", "llama.cpp", "--out", "elsewhere.txt")
    assert (here / "elsewhere.txt").read_text() == said.stdout


def test_a_plan_that_a_runtime_cannot_be_told_is_refused_and_nothing_is_written(here: Path) -> None:
    scores = save_scores(here / "scores.json")
    kvprof("allocate", "--target", "ik_llama.cpp", "--budget", "5.2", "--scores", scores, "--out", "plan.json")
    before = sorted(here.iterdir())
    said = kvprof("export", "plan.json", "--to", "llama.cpp", code=4)
    assert "kvprof allocate --target llama.cpp --budget 5." in said.stderr
    assert sorted(here.iterdir()) == before


def test_bits_that_a_runtime_has_not_are_refused_with_its_reach(here: Path) -> None:
    scores = save_scores(here / "scores.json")
    said = kvprof("allocate", "--target", "llama.cpp", "--budget", "4", "--scores", scores, code=3)
    assert "cheapest plan: 4.5" in said.stderr
    assert "--budget 4.5" in said.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "llama.ccp", "--budget", "5"], "did you mean 'llama.cpp'?"),
        (["--target", "llama.cpp", "--max-kl", "0.1"], "leave out --max-kl"),
        (["--target", "llama.cpp", "--budget", "5", "--tie", "key-value"], "--tie"),
        (["--target", "llama.cpp", "--budget", "5", "--rule", "uniform"], "--rule uniform takes no"),
        (["--target", "llama.cpp", "--budget", "5", "--metric", "spectral_norm"], "loss_increase"),
        (["--target", "mlx-lm", "--budget", "5"], "kvprof gradients --target mlx-lm"),
        (["--target", "llama.cpp", "--budget", "5", "--formats", "q6_0"], "llama.cpp knows no q6_0"),
        (["--budget", "5"], "--target"),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], message: str, here: Path) -> None:
    scores = save_scores(here / "scores.json")
    said = kvprof("allocate", *words, "--scores", scores, code=2)
    assert message in " ".join(said.stderr.split())
    assert sorted(here.iterdir()) == [scores]


def test_a_format_that_was_not_scored_is_not_replaced_by_all_that_were(here: Path) -> None:
    scores = save_scores(here / "scores.json")
    for formats in ("key:iq4_nl", "iq4_nl", "key:q4_0,value:iq4_nl"):
        words = ("--target", "llama.cpp", "--budget", "5", "--formats", formats, "--scores", scores)
        said = kvprof("allocate", *words, "--out", "plan.json", code=2)
        assert "iq4_nl was not scored" in said.stderr
        assert not (here / "plan.json").exists()


def test_formats_that_the_heads_cannot_have_leave_the_others(here: Path) -> None:
    shape = {"layer": 0, "kind": "full", "kv_heads": 2, "key_head_dim": 64, "value_head_dim": 64}
    losses = {"loss_increase": {"mlx4g64": 0.1, "mlx8g64": 0.01, "mlx4g128": 0.2}}
    content = {
        "schema": "kvprof.scores/1",
        "geometry": {"dtype": "float16", "layers": [shape]},
        "layers": [{"layer": 0, "key": losses, "value": losses}],
    }
    (here / "scores.json").write_text(json.dumps(content))
    words = ("--target", "mlx-lm", "--scores", "scores.json", "--out", "plan.json")
    kvprof("allocate", *words, "--budget", "5")
    assert BitPlan.load("plan.json").layers[0].key.name == "mlx4g64"
    kvprof("allocate", *words, "--budget", "8.5", "--group-size", "64")
    assert BitPlan.load("plan.json").layers[0].key.name == "mlx8g64"
    assert "no" in kvprof("allocate", *words, "--budget", "5", "--group-size", "32", code=2).stderr


def test_small_heads_have_kvtuners_formats_too(here: Path) -> None:
    shape = {"layer": 0, "kind": "full", "kv_heads": 2, "key_head_dim": 16, "value_head_dim": 16}
    content = {
        "schema": "kvprof.scores/1",
        "geometry": {"dtype": "float16", "layers": [shape]},
        "layers": [
            {
                "layer": 0,
                "key": {"loss_increase": {"int2g32": 0.1, "int8g32": 0.01}},
                "value": {"loss_increase": {"int2g16": 0.1, "int8g16": 0.01}},
            }
        ],
    }
    (here / "scores.json").write_text(json.dumps(content))
    words = ("--target", "kvtuner", "--scores", "scores.json", "--out", "plan.json")
    kvprof("allocate", *words, "--budget", "7")
    assert kvprof("export", "plan.json", "--to", "kvtuner").stdout == "0:\n  nbits_key: 8\n  nbits_value: 2\n"


@pytest.mark.parametrize("name", ["llama.cpp", "vllm", "modelopt", "exllamav3", "kvtuner", "mlx-lm", "sglang"])
@pytest.mark.parametrize("form", ["rot2", "full", "int6g128"])
def test_the_command_that_a_refusal_names_is_within_the_runtimes_reach(name: str, form: str, here: Path) -> None:
    target = TARGETS[name]
    shape = {"layer": 0, "kind": "full", "kv_heads": 2, "key_head_dim": 64, "value_head_dim": 64}
    losses = {
        tensor: {
            "loss_increase": {one: 0.1 for one in (*target.formats_of(tensor), "rot2", "int6g128") if one != "full"}
        }
        for tensor in ("key", "value")
    }
    content = {
        "schema": "kvprof.scores/1",
        "geometry": {"dtype": "float16", "layers": [shape]},
        "layers": [{"layer": 0, **losses}],
    }
    (here / "scores.json").write_text(json.dumps(content))
    kvprof("allocate", "--rule", "uniform", "--formats", form, "--scores", "scores.json", "--out", "plan.json")
    if form == "full" and "full" in target.formats_of("key"):
        kvprof("export", "plan.json", "--to", name)
        return
    advice = kvprof("export", "plan.json", "--to", name, code=4).stderr.split("kvprof ")[1].split()
    kvprof(*advice, "--scores", "scores.json", "--out", "other.json")
    kvprof("export", "other.json", "--to", name)


def test_a_plan_is_not_replaced_by_its_artefact(here: Path) -> None:
    scores = save_scores(here / "scores.json")
    kvprof("allocate", "--target", "llama.cpp", "--budget", "5", "--scores", scores, "--out", "plan.json")
    assert "the plan itself" in kvprof("export", "plan.json", "--to", "llama.cpp", "--out", "plan.json", code=2).stderr
    BitPlan.load("plan.json")
    kvprof("export", "plan.json", "--to", "llama.cpp", "--out", "llama.cpp")
    assert (here / "llama.cpp" / "plan.llama.cpp.args").exists()


def test_formats_narrow_the_choice_of_a_runtime(here: Path) -> None:
    scores = save_scores(here / "scores.json")
    words = ("--formats", "key:q8_0,value:q4_1", "--scores", scores, "--out", "plan.json")
    kvprof("allocate", "--target", "llama.cpp", "--budget", "6.75", *words)
    assert {(entry.key.name, entry.value.name) for entry in BitPlan.load("plan.json").layers} == {("q8_0", "q4_1")}


def test_gradients_score_a_runtimes_formats_in_its_own_window(here: Path) -> None:
    save_folder(here / "model")
    save_text(here / "text.txt")
    text = ["--data", "text.txt", "--pack", "--sequences", "2", "--sequence-length", "40"]
    kvprof("gradients", "model", *text, "--target", "vllm")
    (path,) = here.glob("outputs/*/vllm/gradients.json")
    scores = Scores.load(path)
    assert scores.decoding is not None
    assert scores.decoding.window.recent_tokens == scores.decoding.window.sink_tokens == 0
    assert scores.decoding.window.own_token_stored
    assert set(scores.layers[0].key.loss_increase) >= {"fp8_e4m3", "fp8_e5m2", "turbo_k4"}
    assert set(scores.layers[0].value.loss_increase) >= {"fp8_e4m3", "turbo_v4"}
    kvprof("allocate", "--target", "vllm", "--budget", "10", "--out", "plan.json")
    said = kvprof("export", "plan.json", "--to", "vllm")
    assert said.stdout.startswith("--kv-cache-dtype ")
    refused = kvprof("gradients", "model", *text, "--formats", "q4_0", code=2)
    assert "q4_0 needs heads that are a multiple of 32 channels" in refused.stderr


def test_both_words_for_a_runtime_work_in_both_commands(here: Path) -> None:
    scores = save_scores(here / "scores.json")
    for word in ("--to", "--target"):
        kvprof("allocate", word, "llama.cpp", "--budget", "5", "--scores", scores, "--out", "plan.json")
        assert BitPlan.load("plan.json").solver.target == "llama.cpp"
        assert kvprof("export", "plan.json", word, "llama.cpp").stdout == "-fa on -ctk q5_0 -ctv q4_0\n"


def test_a_device_narrows_the_types_and_is_spoken_of_at_allocate(here: Path) -> None:
    scores = save_scores(here / "scores.json", iq4_nl=0.001)
    words = ("allocate", "--target", "llama.cpp", "--budget", "5", "--scores", scores, "--out", "plan.json")
    found = {}
    for device in ("any", "cpu", "cuda", "metal"):
        said = kvprof(*words, *([] if device == "any" else ["--device", device]))
        entry = BitPlan.load("plan.json").layers[0]
        found[device] = entry.key.name, entry.value.name
        assert ("CUDA has no flash attention for iq4_nl" in said.stderr) == (device == "any")
    assert found == {
        "any": ("iq4_nl", "iq4_nl"),
        "cpu": ("iq4_nl", "iq4_nl"),
        "cuda": ("q5_0", "q4_0"),
        "metal": ("q4_1", "q4_1"),  # alike, or Metal's flash attention takes neither
    }
    kvprof("verify", "plan.json", "--scores", scores)
    assert "takes the same on every device" in kvprof(*words[:2], "vllm", *words[3:], "--device", "cuda", code=2).stderr


STORED_FIRST = set(TARGETS) - {"transformers", "kvtuner"}
"""Runtimes that write a token into the cache and then attend to it there; the sources stand in each target's file."""


def test_a_plan_has_a_querys_own_token_as_its_runtime_reads_it() -> None:
    assert {name for name, target in TARGETS.items() if target.window.own_token_stored} == STORED_FIRST


def test_scores_that_read_every_own_token_exactly_are_kept_and_it_is_said(here: Path) -> None:
    """As an earlier kvprof wrote them: the plan's window is the one that its prediction speaks of."""
    path = save_scores(here / "scores.json")
    scores = json.loads(path.read_text())
    scores["decoding"] = {"window": {"sink_tokens": 0, "recent_tokens": 0}, "suffix_fraction": 0.5, "tokens": 100}
    path.write_text(json.dumps(scores))
    said = kvprof("allocate", "--target", "llama.cpp", "--budget", "5", "--scores", path, "--out", "plan.json")
    assert not BitPlan.load("plan.json").window.own_token_stored
    assert "own_token_stored" not in (here / "plan.json").read_text()
    assert "llama.cpp reads a query's own key and value as they are stored" in said.stderr
    kvprof("verify", "plan.json", "--scores", path)
    assert "llama.cpp reads a query's own key" in kvprof("export", "plan.json", "--to", "llama.cpp").stderr


def test_a_cache_of_kvprofs_refuses_own_tokens_as_stored() -> None:
    from tiny import tiny_model

    from kvprof.errors import CacheError
    from kvprof.runtime import PlanCache

    entry = {"bits": 4, "group_size": 8, "axis": "token"}
    plan = BitPlan.from_json(
        {
            "schema": "kvprof.plan/1",
            "model": {"num_layers": 2},
            "quantizer": {},
            "window": {"sink_tokens": 0, "recent_tokens": 0, "own_token_stored": True},
            "layers": [{"layer": layer, "key": entry, "value": entry} for layer in range(2)],
        },
        "plan",
    )
    with pytest.raises(CacheError, match="own key and value as they are stored"):
        PlanCache.from_plan(plan, tiny_model("llama"))


def test_a_cache_of_kvprofs_refuses_another_runtimes_formats(here: Path) -> None:
    from tiny import tiny_model

    from kvprof.errors import CacheError
    from kvprof.runtime import PlanCache

    model = tiny_model("llama")
    entry = {"scheme": "fp8_e4m3", "bits": 8, "group_size": 1, "axis": "token"}
    plan = BitPlan.from_json(
        {
            "schema": "kvprof.plan/1",
            "model": {"num_layers": 2},
            "quantizer": {},
            "window": {"sink_tokens": 0, "recent_tokens": 0},
            "layers": [{"layer": layer, "key": entry, "value": entry} for layer in range(2)],
        },
        "plan",
    )
    with pytest.raises(CacheError, match="layer 0 is to be stored as fp8_e4m3"):
        PlanCache.from_plan(plan, model)
