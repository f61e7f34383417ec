"""The two scripts that a newcomer runs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from quickstart import Quickstart

from kvprof import BitPlan

ROOT = Path(__file__).parents[1]


@pytest.mark.demo
def test_quickstart_runs_from_any_folder_and_ends_with_a_plan(quickstart: Quickstart) -> None:
    assert quickstart.output.splitlines()[-1] == "written to outputs/demo/plan-2.50.json"
    assert len(BitPlan.load(quickstart.folder / "plan-2.50.json").layers) == 30


def test_a_python_that_is_too_old_or_absent_is_named(tmp_path: Path) -> None:
    for script in ("recipes/quickstart.sh", "tests/run.sh"):
        done = subprocess.run(
            ["bash", str(ROOT / script)],
            env=os.environ | {"PYTHON": "no-such-python"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert "no-such-python" in done.stderr


def test_ci_runs_the_test_script() -> None:
    assert "tests/run.sh" in (ROOT / ".ci" / "run").read_text()


def test_the_constraints_pin_every_declared_dependency() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "recipes" / "constraints.txt").read_text().splitlines()
    names, pinned = (
        {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in group} for group in (declared, lines)
    )
    assert names <= pinned
