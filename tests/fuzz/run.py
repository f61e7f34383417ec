"""Read many damaged files with every reader of kvprof's, and say what was found.

    python tests/fuzz/run.py --inputs 200000 --seed 1          # of each reader
    python tests/fuzz/run.py --only gguf --inputs 50000
    python tests/fuzz/run.py --coverage --inputs 200000        # libFuzzer, by what code runs: pip install atheris

Input N of a seed is always the same. An input that does harm (an error that is not kvprof's own, more than a second,
more memory than ten times its bytes and 32 MiB) is kept in tests/data/fuzz/, which the tests read again, and the exit
status is 1. Of every fiftieth the memory is measured. --json prints what was done as rows of a table.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reliability import Trial, print_trials

MEMORY_EVERY = 50
MOST_KEPT = 20
"""Harmful inputs of one reader: more would be the same defect again."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to go on where a run ended")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop then, whatever is left")
    parser.add_argument("--only", action="append", help="a reader; can be repeated")
    parser.add_argument("--coverage", action="store_true", help="let atheris choose the inputs")
    parser.add_argument("--corpus", type=Path, help="where harmful inputs are kept", default=None)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.coverage:
        return by_coverage(asked)
    from fuzz.readers import CORPUS, READERS

    gc.freeze()  # what is imported is no input's garbage: looking through it would take longer than reading
    names = asked.only or list(READERS)
    start = time.monotonic()
    trials = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for place, name in enumerate(names):
            until = start + asked.seconds * (place + 1) / len(names)
            numbers = range(asked.first, asked.first + asked.inputs)
            trials.append(by_chance(name, asked.seed, numbers, until, Path(folder), asked.corpus or CORPUS))
            if not asked.json:
                print_trials(trials[-1:], as_json=False)
    if asked.json:
        print_trials(trials, as_json=True)
    return int(any(trial.failed for trial in trials))


def by_chance(name: str, seed: int, numbers: range, until: float, folder: Path, corpus: Path) -> Trial:
    """Read numbered inputs until a time of the monotonic clock; keep those that do harm in a folder of the corpus."""
    from fuzz.mutations import mutated
    from fuzz.readers import READERS
    from fuzz.watch import read_guarded

    reader, done, failures, start = READERS[name], 0, 0, time.monotonic()
    for number in numbers:
        if time.monotonic() > until:
            break
        done += 1
        content = mutated(reader.seeds, reader.words, random.Random(f"{seed}:{name}:{number}"))
        wrong = read_guarded(reader, folder / "input", content, number % MEMORY_EVERY == 0)
        if wrong is None:
            continue
        failures += 1
        kept = corpus / name / hashlib.sha256(content).hexdigest()[:16]
        if failures <= MOST_KEPT:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)
        print(f"{name} {number}: {wrong} ({kept})", file=sys.stderr)
    return Trial(name, done, failures, seed, time.monotonic() - start)


def by_coverage(asked: argparse.Namespace) -> int:
    """Let libFuzzer look, reader by reader, for inputs that reach code which none before reached.

    Each has a process of its own, which libFuzzer ends.
    """
    from fuzz.readers import READERS

    trials = []
    for name in asked.only or READERS:
        start = time.monotonic()
        command = [sys.executable, __file__.replace("run.py", "guided.py"), name, str(asked.inputs), str(asked.seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 2:
            print(done.stderr, end="", file=sys.stderr)
            return 2
        failed = int(done.returncode != 0)
        if failed:
            print(f"{name}: {_last_words(done.stderr.splitlines())}", file=sys.stderr)
        runs = re.findall(r"^#(\d+)\s.*cov: (\d+)", done.stderr, re.MULTILINE)
        seen = f"{runs[-1][1]} branches reached" if runs else ""
        count = int(runs[-1][0]) if runs else 0
        trials.append(Trial(name, count, failed, asked.seed, time.monotonic() - start, seen))
        if not asked.json:
            print_trials(trials[-1:], as_json=False)
    if asked.json:
        print_trials(trials, as_json=True)
    return int(any(trial.failed for trial in trials))


def _last_words(lines: Sequence[str]) -> str:
    """Return what went wrong and where the input is, of what libFuzzer prints at its end."""
    return "; ".join(line for line in lines if "Error: " in line or "written to" in line)


if __name__ == "__main__":
    sys.exit(main())
