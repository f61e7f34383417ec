"""Measure `gradients --stream` against the same with the model in memory: peak memory, time, and what is written.

python tests/benchmarks/bench_streaming.py

A random model of Qwen2-1.5B's shapes, 3.09 GB in bfloat16, is made in a temporary folder; --quick takes a small one.
Each run is a process of its own, whose memory counts from when its libraries are imported. The last line of each claim
says whether it holds; the exit status is 1 where one does not.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peaks import run_watched
from transformers import AutoModelForCausalLM, Qwen2Config

from kvprof.models.load import load_tokenizer, resolve

QUICK = "--quick" in sys.argv
PEAK_BYTES, TIMES = 1.2e9, 2.0
SHAPES = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = ["--data", "builtin", "--sequences", "1", "--sequence-length", "128" if QUICK else "1024"]
FORMATS = ["--recent-tokens", "16", "--formats", "key:int2g64,value:rot2"]


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        **(SMALL if QUICK else SHAPES),
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    load_tokenizer(resolve("demo")).save_pretrained(folder)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_model(place / "model")
        found = {}
        for label, how in (("--stream", ["--stream"]), ("in memory", [])):
            command = ["gradients", str(place / "model"), *TEXT, *FORMATS, *how, "--out", str(place / label)]
            found[label] = peak_bytes, seconds = run_watched(command, place)
            print(f"{label:<10}{peak_bytes / 1e9:7.2f} GB{seconds:8.1f} s", flush=True)
        files = [(place / label / "gradients.json").read_bytes() for label in found]
    (peak_bytes, seconds), (_, whole_seconds) = found.values()
    claims = {
        f"less than {PEAK_BYTES / 1e9} GB over the imports: {peak_bytes / 1e9:.2f}": peak_bytes < PEAK_BYTES,
        f"at most {TIMES:g} times the time in memory: {seconds / whole_seconds:.2f}": seconds <= TIMES * whole_seconds,
        "the same file, byte for byte": files[0] == files[1],
    }
    for claim, holds in claims.items():
        print(f"{claim} - {'holds' if holds else 'does not hold'}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
