"""What was tried, how often, and what failed: one row of the table of trust (trust_table.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Trial:
    """times: how often it was tried. seed: None where chance had no part. seen: what else there is to say."""

    what: str
    times: int
    failed: int
    seed: int | None
    seconds: float
    seen: str = ""


def print_trials(trials: Sequence[Trial], as_json: bool) -> None:
    """Print trials for a program, or a line each for a reader."""
    if as_json:
        print(json.dumps([asdict(trial) | {"seconds": round(trial.seconds, 1)} for trial in trials], indent=1))
        return
    for trial in trials:
        seed = "" if trial.seed is None else f", seed {trial.seed}"
        seen = trial.seen and f"; {trial.seen}"
        print(f"{trial.what}: {trial.times:,}, {trial.failed} failed, {trial.seconds:.0f} s{seed}{seen}", flush=True)
