"""Models whose cache no plan touches: every command says so, with the reason, in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import save_folder, save_text
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
def latent(in_tmp: Path) -> str:
    """A DeepSeek-V3 whose layers keep latents alone."""
    save_text(in_tmp / "text.txt")
    return str(save_folder(in_tmp / "model", "deepseek-v3"))


def test_inspect_shows_the_latents_their_bytes_and_why_no_plan_has_them(latent: str) -> None:
    result = run("inspect", latent)
    assert result.exit_code == 0
    assert "each token adds 160 bytes (160 B) in 2 of 2 layers" in said(result)  # 2 x (16 + 4) x 4
    assert "left alone by a plan: layers 0-1: layer of latent attention (MLA)" in said(result)
    assert "not counted" not in said(result)


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
