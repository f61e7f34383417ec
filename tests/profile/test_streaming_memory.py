"""Does `gradients --stream` hold a block, and not the model? The peak memory of a process that measures a large one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from benchmarks.peaks import run_watched
from folders import save_folder, save_text
from transformers import AutoModelForCausalLM, LlamaConfig

from kvprof import Scores

ALLOWED_SHARE = 0.5
"""Of the model's bytes: a block, one of fourteen, in float32 at twice its size, and the head."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Half a gigabyte of random bfloat16: fourteen blocks, with the tokenizer of a tiny model."""
    folder = save_folder(tmp_path / "model")
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=14,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=16384,
        dtype="bfloat16",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_text(tmp_path / "text.txt")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="freed memory goes back to the system as glibc does it")
def test_a_streamed_model_takes_the_memory_of_a_block_and_a_head(large: Path, tmp_path: Path) -> None:
    whole_bytes = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    options = "--data text.txt --pack --sequences 2 --sequence-length 40 --recent-tokens 4 --sink-tokens 1"
    peaks = {}
    for name, how in (("streamed", ["--stream"]), ("whole", [])):
        command = ["gradients", "model", *options.split(), "--formats", "key:int2g8,value:rot2", *how, "--out", name]
        peaks[name], _ = run_watched(command, tmp_path)
    assert peaks["streamed"] < ALLOWED_SHARE * whole_bytes < peaks["whole"]
    assert Scores.load(tmp_path / "streamed" / "gradients.json") == Scores.load(tmp_path / "whole" / "gradients.json")
