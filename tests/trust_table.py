"""What was tried to break kvprof, how often, and what failed? Prints the table of trust.

    python tests/trust_table.py                    print it, from tests/data/trust.json
    python tests/trust_table.py --write            put it into kvprof/models/README.md, between its two markers
    python tests/trust_table.py --measure          first try all of it again, for hours, and keep what came
    python tests/trust_table.py --measure decode   or a part of it

Runs programs and tests, reads what they print, writes Markdown. Does not know how anything is tried.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

from coverage_table import PAGE, section
from reliability import Trial

HERE = Path(__file__).resolve().parent
TRIED = HERE / "data" / "trust.json"
MARKERS = ("<!-- trust: begin -->", "<!-- trust: end -->")
COLUMNS = ("what was tried", "how often", "what failed", "seed", "what was seen", "again with")

PARTS = {
    "pickles": ("ways to a pickle, to code or out of a model's folder", "-m pytest tests/models/test_own_code.py"),
    "checkpoints": ("weights missing, doubled or coded", "-m pytest tests/models/test_whole_checkpoints.py"),
    "configs": ("configs and checkpoints that are broken", "-m pytest tests/cli/test_bad_models.py"),
    "journals": ("journals of something else", "-m pytest tests/cli/test_hostile_journals.py"),
    "gguf": ("lies in a GGUF header", "-m pytest tests/models/test_gguf_header.py"),
    "bombs": ("bombs of keys, lists, names and nesting", "-m pytest tests/fuzz/test_bombs.py"),
    "fuzz": ("files damaged by chance", "tests/fuzz/run.py --inputs 200000 --seed 4"),
    "coverage": ("files made by atheris", "tests/fuzz/run.py --coverage --inputs 200000 --seed 4"),
    "moments": ("commands stopped at the worst moments", "-m pytest tests/cli/test_stops.py"),
    "stops": ("commands stopped at random moments", "tests/fuzz/hard_stops.py --lives 200 --seed 1"),
    "locks": ("several processes in one folder", "-m pytest tests/storage/test_lock.py"),
    "disks": ("full and read-only disks", "-m pytest tests/cli/test_full_disk.py"),
    "memory": ("memory that runs out", "-m pytest tests/cli/test_memory_runs_out.py"),
    "repeats": ("processes, threads and batches that may change nothing", "-m pytest tests/profile/test_repeats.py"),
    "numbers": ("numbers at the edge of a format", "-m pytest tests/runtime/test_hard_numbers.py"),
    "models": ("models at the edge of what can be measured", "-m pytest tests/profile/test_hard_models.py"),
    "decode": ("decoding steps through a `PlanCache`", "tests/benchmarks/soak.py decode --seed 20261126"),
    "operations": ("random uses of a `PlanCache`", "tests/benchmarks/soak.py operations --seed 20261126"),
    "measure": ("batches of `gradients`, a day's at 3 s each", "tests/benchmarks/soak.py measure --seed 20261126"),
}
"""What is tried, and Python's command line that tries it: a file of tests, whose cases are counted, or a program that
prints trials; the suite has a short run of each program."""


def table(tried: Mapping[str, Sequence[Trial]]) -> str:
    """Return the table. tried: by part, what was tried in it."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    rows += [_row(what, command, tried[part]) for part, (what, command) in PARTS.items() if part in tried]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(what: str, command: str, trials: Sequence[Trial]) -> tuple[str, ...]:
    """Sum up the trials of one part: what was done to each of several things is one row."""
    failed = sum(trial.failed for trial in trials)
    times, seen = _range([trial.times for trial in trials]), trials[0].seen
    if len(trials) > 1:
        times, seen = f"{times} each", ", ".join(trial.what for trial in trials)
    seeds = {str(trial.seed) for trial in trials if trial.seed is not None}
    return what, times, f"{failed:,}" if failed else "nothing", ", ".join(sorted(seeds)), seen, f"`python {command}`"


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def measure(part: str) -> list[Trial]:
    """Try a part again."""
    what, command = PARTS[part]
    words = [sys.executable, *shlex.split(command)]
    if "pytest" not in words:
        done = subprocess.run([*words, "--json"], cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=False)
        return [Trial(**row) for row in json.loads(done.stdout)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run([*words, "-q", f"--junit-xml={report}"], cwd=HERE.parent, stdout=sys.stderr, check=False)
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    tests, failures, errors, skipped = (int(suite.attrib[each]) for each in ("tests", "failures", "errors", "skipped"))
    return [Trial(what, tests - skipped, failures + errors, None, time.monotonic() - start)]


def load() -> dict[str, list[Trial]]:
    """Return what is kept of the last time that each part was tried."""
    if not TRIED.exists():
        return {}
    kept = json.loads(TRIED.read_text(encoding="utf-8"))
    return {part: [Trial(**row) for row in rows] for part, rows in kept.items()}


def keep(part: str, trials: Sequence[Trial]) -> None:
    """Keep what came of a part at once: the next one may take hours."""
    tried = load() | {part: list(trials)}
    rows = {
        name: [asdict(trial) | {"seconds": round(trial.seconds, 1)} for trial in tried[name]]
        for name in PARTS
        if name in tried
    }
    TRIED.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Do as the command line says; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--write", action="store_true", help="put the table into kvprof/models/README.md")
    asked = parser.parse_args()
    if asked.measure is not None:
        for part in asked.measure or PARTS:
            keep(part, measure(part))
    tried = load()
    made = table(tried)
    if asked.write:
        PAGE.write_text(section(PAGE.read_text(encoding="utf-8"), made, MARKERS), encoding="utf-8")
    print(made)
    return int(any(trial.failed for trials in tried.values() for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
