"""Commands that need no model answer without one library too many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from score_factories import random_scores
from test_commands import handmade_scores

HEAVY = ("torch", "transformers", "datasets", "accelerate", "safetensors")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["gradients", "--help"],
        ["evaluate", "--help"],
        ["benchmark", "--help"],
        ["generate", "--help"],
        ["allocate", "--budget", "3", "--scores", "mine.json", "--out", "plan.json"],
        ["allocate", "--max-kl", "0.05", "--scores", "losses.json", "--out", "plan.json"],
        ["frontier", "--from", "2", "--to", "3", "--scores", "losses.json", "--out", "made"],
        ["show", "mine.json"],
        ["validate", "mine.json"],
        ["schema", "plan"],
        ["run", "--list"],
        ["import", "kvtuner.yaml", "--from", "kvtuner"],
    ],
    ids=" ".join,
)
def test_no_torch_is_imported(in_tmp: Path, arguments: list[str]) -> None:
    handmade_scores(in_tmp / "mine.json")
    random_scores(2).save(in_tmp / "losses.json")
    heavy = HEAVY if arguments[0] == "import" else (*HEAVY, "yaml")
    (in_tmp / "kvtuner.yaml").write_text("0: {nbits_key: 4, nbits_value: 2}\n")
    code = f"""
import sys
sys.argv = ["kvprof", *{arguments!r}]
from kvprof.__main__ import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
found = [name for name in {heavy!r} if name in sys.modules]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_the_script_does() -> None:
    done = subprocess.run([sys.executable, "-m", "kvprof", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kvprof ")
