"""Norms that were stopped: does the same command go on where it was, to the very same file?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, point_here, running_hub
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.errors import Mismatch, ModelError
from kvprof.models.load import resolve
from kvprof.models.source import ModelSource
from kvprof.profile.norms import run_norms

LAYERS = 5
REMOTE = "org/deep"


class Stopped(Exception):
    """What stops a run."""


@pytest.fixture
def model(in_tmp: Path) -> Path:
    """A model of a few layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=96,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(in_tmp / "model", max_shard_size="20KB")
    return in_tmp / "model"


@pytest.fixture
def hub(model: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has the model, and a client that asks it and waits for nothing."""
    with running_hub() as hub:
        point_here(hub.url, in_tmp / "hub-cache", monkeypatch)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        hub.models[REMOTE] = model
        yield hub


def norms(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["norms", *arguments])


def stop_after(layers: int) -> Callable[[int, int], None]:
    """Stop a run of layers alike once so many are done."""

    def progress(done_bytes: int, total_bytes: int) -> None:
        if done_bytes * LAYERS == total_bytes * layers:
            raise Stopped

    return progress


def stopped(source: ModelSource, folder: Path, layers: int) -> None:
    with pytest.raises(Stopped):
        run_norms(source, folder, progress=stop_after(layers))


def layers_read(hub: FakeHub, served: Path) -> set[int]:
    """Say of which layers the hub has sent keys or values, from the headers of the files that it serves."""
    found = set()
    for shard in served.glob("*.safetensors"):
        content = shard.read_bytes()
        first = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:first]).items():
            if ".k_proj." in name or ".v_proj." in name:
                start, stop = (first + offset for offset in entry["data_offsets"])
                if any(shard.name == sent and low < stop and high > start for _, sent, low, high in hub.ranges):
                    found.add(int(name.split(".")[2]))
    return found


@pytest.mark.parametrize("layers", [1, 3, LAYERS])
def test_a_stopped_run_goes_on_with_the_missing_layers_to_the_same_file(
    layers: int, hub: FakeHub, model: Path, in_tmp: Path
) -> None:
    source = resolve(REMOTE)
    whole = run_norms(source, in_tmp / "whole")
    stopped(source, in_tmp / "resumed", layers)
    assert not (in_tmp / "resumed" / "norms.json").exists()
    hub.ranges.clear()
    result = norms(REMOTE, "--out", "resumed")
    assert result.exit_code == 0, result.output
    said = f"went on with a stopped run: {layers} of {LAYERS} layers were measured before"
    assert said in " ".join(result.output.split())
    assert layers_read(hub, model) == set(range(layers, LAYERS))
    assert (in_tmp / "resumed" / "norms.json").read_bytes() == whole.path.read_bytes()
    assert os.listdir(in_tmp / "resumed") == ["norms.json"]
    assert whole.remarks == ()


def test_a_journal_torn_at_any_byte_is_gone_on_with(model: Path, in_tmp: Path) -> None:
    source = resolve(str(model))
    whole = run_norms(source, in_tmp / "whole").path.read_bytes()
    stopped(source, in_tmp / "torn", LAYERS)
    journal = (in_tmp / "torn" / "norms.journal").read_bytes()
    ends = [index + 1 for index, byte in enumerate(journal) if byte == ord("\n")]
    assert len(ends) == 1 + LAYERS
    for cut in sorted({*range(0, len(journal), 97), *ends, *(end - 1 for end in ends)}):
        (in_tmp / "torn" / "norms.journal").write_bytes(journal[:cut])
        run = run_norms(source, in_tmp / "torn")
        assert run.path.read_bytes() == whole
        done = sum(end <= cut for end in ends[1:])
        assert (f": {done} of {LAYERS} layers" in " ".join(run.remarks)) == (done > 0)


def test_a_hub_that_fails_in_the_middle_loses_no_layer(hub: FakeHub, in_tmp: Path) -> None:
    source = resolve(REMOTE)
    whole = run_norms(source, in_tmp / "whole").path.read_bytes()

    def fail_after_two(done_bytes: int, total_bytes: int) -> None:
        if done_bytes * LAYERS == total_bytes * 2:
            hub.failing[REMOTE] = (503, "")

    with pytest.raises(ModelError, match=r"on the hub: .*503"):
        run_norms(source, in_tmp / "out", progress=fail_after_two)
    hub.failing.clear()
    run = run_norms(source, in_tmp / "out")
    assert run.path.read_bytes() == whole
    assert run.remarks == (f"went on with a stopped run: 2 of {LAYERS} layers were measured before",)


def test_a_run_on_files_that_have_changed_since_is_refused_unless_begun_anew(model: Path, in_tmp: Path) -> None:
    stopped(resolve(str(model)), in_tmp / "out", 2)
    shard = sorted(model.glob("*.safetensors"))[-1]
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    result = norms(str(model), "--out", "out")
    assert result.exit_code == 4
    assert "a stopped run with another checkpoint" in " ".join(result.output.split())
    assert "--restart" in result.output
    again = norms(str(model), "--out", "out", "--restart")
    assert again.exit_code == 0, again.output
    assert "went on" not in again.output


def test_a_run_on_another_commit_is_refused(hub: FakeHub, in_tmp: Path) -> None:
    stopped(resolve(REMOTE), in_tmp / "out", 2)
    hub.commits[REMOTE] = "f" * 40
    with pytest.raises(Mismatch, match=f"another checkpoint: it has 'commit 0123.*, this command 'commit {'f' * 40}'"):
        run_norms(resolve(REMOTE), in_tmp / "out")


def test_a_model_that_was_downloaded_meanwhile_is_gone_on_with(hub: FakeHub, in_tmp: Path) -> None:
    source = resolve(REMOTE)
    whole = run_norms(source, in_tmp / "whole").path.read_bytes()
    stopped(source, in_tmp / "out", 2)
    source.fetch(weights=True)
    run = run_norms(source, in_tmp / "out")
    assert run.fetched is None
    assert run.remarks
    assert run.path.read_bytes() == whole
