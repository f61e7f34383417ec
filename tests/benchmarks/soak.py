"""Let a cache and a measurement live long, and look whether they keep their promises: bytes, numbers, no leak.

python tests/benchmarks/soak.py [decode] [operations] [measure] [--seed N] [--quick] [--json]

decode: 20,000 tokens, one by one, each step's bytes compared with the plan's, and at 40 looks every number with a
reference written apart. operations: 2,000 random uses of a cache (crop, reorder, select, repeat, save and load, copy,
reset) against lists of tokens. measure: gradient norms and losses of a tiny model for 28,800 batches, a day's at three
seconds each. What is found is printed, a line a part; the exit status is 1 where memory grew by more than the results
that are kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from reliability import Trial, print_trials
from soaking import Memory, decode, measure, operate

PARTS = ("decode", "operations", "measure")
MOST_OBJECTS_A_STEP = {"decode": 0.5, "operations": 20.0, "measure": 150.0}
"""Small objects of Python's: pages; what safetensors, in saving, keeps of each new length of a tensor (a type of
ctypes'); of each batch the results, for their standard errors."""
MOST_RESIDENT_A_STEP = {"decode": 4096.0, "operations": 8192.0, "measure": 8192.0}
"""Of the process: what decoding holds by its plan, 1 KiB a token, and what a heap leaves unused."""
FURTHEST = 5e-6
"""From the reference, as a share of the largest number: a rotated number's last place."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all of them by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a fiftieth of it: a look whether it runs")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    for part in asked.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}: choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    trials = [_run(part, asked.seed, 50 if asked.quick else 1) for part in asked.parts or PARTS]
    print_trials(trials, asked.json)
    return int(any(trial.failed for trial in trials))


def _run(part: str, seed: int, share: int) -> Trial:
    start = time.monotonic()

    def progress(done: int) -> None:
        print(f"{part}: {done} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    looks = 40 // min(share, 8)
    right, seen = True, ""
    if part == "decode":
        times = 20_000 // share
        decoded = decode(times, looks, seed, progress)
        memory, right = decoded.memory, max(decoded.furthest) < FURTHEST
        seen = f"at most {max(decoded.furthest):.1e} from the reference, {decoded.furthest[-1]:.1e} at the end; "
    elif part == "operations":
        times = 2000 // share
        with tempfile.TemporaryDirectory() as folder:
            counts, memory = operate(times, looks, seed, Path(folder), progress)
        print(f"operations: {counts}", file=sys.stderr, flush=True)
    else:
        times = 28_800 // share
        memory = measure(times, looks, seed, True, progress)
    objects, resident = memory.slope("blocks"), memory.slope("resident")
    flat = share > 1 or (objects < MOST_OBJECTS_A_STEP[part] and resident < MOST_RESIDENT_A_STEP[part])
    seen += _memory_seen(memory, objects)
    return Trial(part, times, int(not (right and flat)), seed, time.monotonic() - start, seen)


def _memory_seen(memory: Memory, objects: float) -> str:
    first, last = (memory.resident[place] / 2**20 for place in (len(memory.resident) // 2, -1))
    return f"{objects:.1f} objects more a step, {first:.0f} MiB resident halfway and {last:.0f} at the end"


if __name__ == "__main__":
    sys.exit(main())
