"""The release of each runtime that its target was last held against, and when: one table for all.

`tests/targets/run.sh` installs those that are Python packages and records which words they take.
"""

from __future__ import annotations

from typing import NamedTuple


class Checked(NamedTuple):
    """A release. date: ISO 8601, of the day on which kvprof's claims were held against it."""

    version: str
    date: str


CHECKED = {
    "transformers": Checked("5.23.0", "2026-11-30"),
    "ik_llama.cpp": Checked("commit 8337e4cd3 of 2026-08-15", "2026-11-30"),
    "llama.cpp": Checked("sources of autumn 2026", "2026-11-30"),
    "vllm": Checked("0.33.0", "2026-11-30"),
    "modelopt": Checked("0.47.0", "2026-11-30"),
    "compressed-tensors": Checked("0.20.1", "2026-11-30"),
    "sglang": Checked("0.5.23", "2026-11-30"),
    "lmdeploy": Checked("0.18.0", "2026-11-30"),
    "tensorrt-llm": Checked("main of autumn 2026, before 1.4", "2026-11-30"),
    "mlx-vlm": Checked("0.7.10", "2026-11-30"),
    "mlx-lm": Checked("0.32.2", "2026-11-30"),
    "exllamav3": Checked("1.6.5", "2026-11-30"),
    "kvtuner": Checked("as published with arXiv 2502.04420", "2026-11-30"),
}
"""By the target's name."""
