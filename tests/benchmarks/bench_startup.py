"""Time the commands that import no torch, beyond what the interpreter itself takes to start.

python tests/benchmarks/bench_startup.py

Best and median of interleaved repeats, by the clock. The exit status is 1 where a command's best is not below 0.5 s.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 9
SECONDS = 0.5


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores, plan = folder / "norms.json", folder / "plan.json"
        scores.write_text(json.dumps(handwritten_scores()))
        kvprof = [sys.executable, "-m", "kvprof"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "kvprof --help": [*kvprof, "--help"],
            "kvprof allocate": [*kvprof, "allocate", "--scores", str(scores), "--budget", "2.5", "--out", str(plan)],
            "kvprof show": [*kvprof, "show", str(plan)],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(REPEATS):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, cwd=folder)
                seconds[name].append(time.perf_counter() - start)

    bare_best = min(seconds["python -c pass"])
    print(f"{'':<16}{'best s':>8}{'median s':>10}{'best beyond python s':>22}")
    for name, times in seconds.items():
        print(f"{name:<16}{min(times):8.3f}{statistics.median(times):10.3f}{min(times) - bare_best:22.3f}")
    holding = True
    for name, times in seconds.items():
        if name != "python -c pass":
            holds = min(times) - bare_best < SECONDS
            holding = holding and holds
            print(f"{name} starts in less than {SECONDS} s - {'holds' if holds else 'does not hold'}")
    return 0 if holding else 1


def handwritten_scores(layers: int = 32) -> dict[str, object]:
    return {
        "schema": "kvprof.scores/1",
        "layers": [
            {"layer": layer, "key": {"spectral_norm": 9.0 + layer % 7}, "value": {"spectral_norm": 4.0 + layer % 5}}
            for layer in range(layers)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
