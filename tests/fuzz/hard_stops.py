"""Stop every command at random times by every signal, and look whether anything is lost or half-written.

Prints one row of what was tried, how many times, what failed and the seed; each failure is printed, and ends it with 1.
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

import lives

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
    asked = options.parse_args()
    chance, failed, stopped = random.Random(asked.seed), 0, 0
    place = Path(tempfile.mkdtemp(prefix="kvprof-lives-"))
    os.environ |= {"KVPROF_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    lives.prepare_imports()
    template = place / "template"
    template.mkdir()
    lives.make_template(template)
    length = {}
    for name, command in lives.COMMANDS.items():
        start = time.monotonic()
        assert lives.ended(lives.begin(command, template))[0] == 0
        length[name] = time.monotonic() - start
    for number in range(asked.lives):
        name, sent = chance.choice(list(lives.COMMANDS)), chance.choice(list(SIGNALS))
        after = chance.uniform(0.01, length[name])
        life = lives.stop_once(template, place / f"life-{number}", name, after, sent)
        stopped += life["status"] != 0
        if (wrong := why_wrong(life, sent)) is not None:
            failed += 1
            print(f"{name}, signal {sent} after {after:.3f} s: {wrong}\n{life['said']}\n{life['said_again']}")
    print(
        f"| ten commands, each signal at a random time | {asked.lives} ({stopped} stopped) | {failed} | {asked.seed} |"
    )
    if not failed:
        shutil.rmtree(place)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
