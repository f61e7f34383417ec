"""Stop every command at random times by every signal, and look whether anything is lost or half-written.

Prints what was tried, how many times, what failed and the seed; each failure is printed, and ends it with 1.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import process_harness
from reliability import Trial, print_trials

SIGNALS = {int(signal.SIGINT): 130, int(signal.SIGTERM): 143, int(signal.SIGKILL): -9}


def why_wrong(life: dict[str, Any], number: int) -> str | None:
    """Return what is wrong with a life that was stopped, or None."""
    # What was over before the signal came says so; what ends in its last milliseconds may be killed after its work.
    allowed = {0, SIGNALS[number]}
    if life["status"] not in allowed:
        return f"exit code {life['status']}"
    if "Traceback" in life["said"] + life["said_again"]:
        return "a traceback"
    if life["status"] > 0 and "stopped." not in life["said"]:
        return "no word on how to go on"
    for what in ("half_written", "gone", "differs"):
        if life[what]:
            return f"{what}: {life[what]}"
    return None if life["again"] == 0 else f"the same command again ended with {life['again']}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--lives", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    chance, failed, stopped = random.Random(asked.seed), 0, 0
    place = Path(tempfile.mkdtemp(prefix="kvprof-lives-"))
    os.environ |= {"KVPROF_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    process_harness.prepare_imports()
    template = place / "template"
    template.mkdir()
    process_harness.make_template(template)
    length, begun = {}, time.monotonic()
    for name, command in process_harness.COMMANDS.items():
        start = time.monotonic()
        assert process_harness.ended(process_harness.begin(command, template))[0] == 0
        length[name] = time.monotonic() - start
    for number in range(asked.lives):
        name, sent = chance.choice(list(process_harness.COMMANDS)), chance.choice(list(SIGNALS))
        after = chance.uniform(0.01, length[name])
        life = process_harness.stop_once(template, place / f"life-{number}", name, after, sent)
        stopped += life["status"] != 0
        if (wrong := why_wrong(life, sent)) is not None:
            failed += 1
            said = f"{life['said']}\n{life['said_again']}"
            print(f"{name}, signal {sent} after {after:.3f} s: {wrong}\n{said}", file=sys.stderr)
    seen = f"ten commands; SIGINT, SIGTERM and SIGKILL; {stopped} were not over yet"
    print_trials([Trial("stops", asked.lives, failed, asked.seed, time.monotonic() - begun, seen)], asked.json)
    if not failed:
        shutil.rmtree(place)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
