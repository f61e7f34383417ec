"""Models whose cache no plan touches: every command says so, with the reason, in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import save_folder, save_text
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from typer.testing import CliRunner, Result

from kvprof.cli.app import app

TEXT = ("--data", "text.txt", "--sequence-length", "24", "--sequences", "2")


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def said(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture
def latent(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A DeepSeek-V3 as transformers before 5.15 has it: keys and values are cached, not the latent they are made of."""
    save_text(in_tmp / "text.txt")
    folder = str(save_folder(in_tmp / "model", "deepseek-v3"))
    monkeypatch.delattr(modeling_deepseek_v3.DeepseekV3Attention, "expand_kv", raising=False)
    return folder


def test_inspect_says_what_is_not_known_and_no_number(latent: str) -> None:
    result = run("inspect", latent)
    assert result.exit_code == 0
    assert "what a token adds is not known: caches of a kind of their own, layers 0-1" in said(result)
    assert "left alone by a plan: layers 0-1: layer of latent attention (MLA)" in said(result)
    assert "0 B" not in said(result)
    found = json.loads(run("inspect", latent, "--json").output)
    assert found["bytes_per_token"] is found["bytes_at"] is None


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("norms",), 1),
        (("gradients", *TEXT), 1),
        (("gradients", *TEXT, "--formats", "none"), 1),
        (("divergence", *TEXT), 2),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else None,
)
def test_measuring_latents_is_refused_before_anything_is_done(latent: str, words: tuple[str, ...], code: int) -> None:
    result = run(words[0], latent, *words[1:], "--out", "result")
    assert result.exit_code == code
    assert said(result).startswith("error:")
    assert "latent attention (MLA)" in said(result)
    assert "estimate" not in said(result)
    assert len(result.output.splitlines()) <= 4
    assert not list(Path("result").glob("*"))


@pytest.mark.parametrize("command", [("norms",), ("gradients", *TEXT)], ids=lambda words: words[0])
def test_scores_of_windows_alone_are_not_allocated(in_tmp: Path, command: tuple[str, ...]) -> None:
    save_folder(in_tmp / "model", "mistral-sliding")
    save_text(in_tmp / "text.txt")
    assert run(command[0], "model", *command[1:], "--out", "out").exit_code == 0
    result = run("allocate", "--scores", f"out/{command[0]}.json", "--budget", "3")
    assert result.exit_code == 1
    assert "sliding window of 16 tokens, no more than stay in full precision" in said(result)


def test_a_plan_of_another_model_does_not_fit_latents(latent: str) -> None:
    entry = {"bits": 4, "group_size": 8}
    layers = [{"layer": n, "key": entry | {"axis": "channel"}, "value": entry | {"axis": "token"}} for n in range(2)]
    Path("plan.json").write_text(
        json.dumps(
            {
                "schema": "kvprof.plan/1",
                "model": {"num_layers": 2},
                "quantizer": {"scale_dtype": "float16", "zero_dtype": "float16", "rotation_seed": 0},
                "window": {"sink_tokens": 2, "recent_tokens": 8},
                "layers": layers,
            }
        )
    )
    for words in (("validate", "plan.json", latent), ("evaluate", "plan.json", "--model", latent, "--no-rivals")):
        result = run(*words)
        assert result.exit_code == 4, result.output
        assert "latent" in said(result)


def test_a_plan_of_keys_and_values_does_not_fit_latents_that_can_be_planned(in_tmp: Path) -> None:
    save_folder(in_tmp / "model", "deepseek-v3")
    full = {"bits": 16, "group_size": 8, "axis": "token"}
    plan = {
        "schema": "kvprof.plan/1",
        "model": {"num_layers": 2},
        "quantizer": {},
        "window": {"sink_tokens": 0, "recent_tokens": 0},
        "layers": [{"layer": layer, "key": full, "value": full} for layer in range(2)],
    }
    Path("plan.json").write_text(json.dumps(plan))
    result = run("validate", "plan.json", "model")
    assert result.exit_code == 4
    assert "names key and value of layer 0, which has latent and rope" in said(result)
