"""The quickstart as a newcomer runs it: what it prints, and the files that it leaves for other tests to look at."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv"
RESULTS = ROOT / "outputs" / "demo"


@dataclass(frozen=True)
class Quickstart:
    """What was printed, and the folder that holds the results."""

    output: str
    folder: Path

    @property
    def commands(self) -> list[str]:
        """The commands that were run, as they are typed."""
        return [line.removeprefix("$ ") for line in self.output.splitlines() if line.startswith("$ ")]


USUAL = ("kvprof gradients", "kvprof allocate --budget 2.5")
"""What the quickstart says to run next: the pages show what these print, and other tests look at their results."""


def run_quickstart(elsewhere: Path) -> str:
    """Run recipes/quickstart.sh from another folder, then the usual measurement; return what they print."""
    (RESULTS / "plan-2.50.json").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / "quickstart.sh")], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + "".join(map(_run, USUAL))


def _run(command: str) -> str:
    name, *words = command.split()
    done = subprocess.run([str(VENV / "bin" / name), *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return f"\n$ {command}\n{done.stdout}"
