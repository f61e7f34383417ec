"""What a shell completes: commands, and the words that only kvprof knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvprof.cli import completion

LINES = {
    "alloc": ["allocate"],
    "val": ["validate"],
    "run qu": ["quickstart"],
    "export plan.json --to ll": ["llama.cpp"],
    "allocate --target vl": ["vllm"],
    "allocate --metric s": ["spectral_norm"],
    "allocate --rule k": ["kvmix"],
    "gradients --target ik": ["ik_llama.cpp"],
    "explain plan.json --metric g": ["gradient_norm"],
    "import file --from k": ["kvtuner"],
    "schema pl": ["plan", "plot"],
}


@pytest.mark.parametrize("line", LINES)
def test_a_shell_completes_what_kvprof_knows(line: str, in_tmp: Path) -> None:
    words = ["kvprof", *line.split()]
    asked = {"_KVPROF_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-c", "import sys; sys.argv[:] = ['kvprof']; from kvprof.__main__ import main; main()"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == LINES[line], done.stderr


def test_recipes_of_one_s_own_are_completed_too(in_tmp: Path) -> None:
    for name in ("mine.toml", "other.txt", ".hidden.toml", "folder/a.toml", "quick.toml"):
        (in_tmp / name).parent.mkdir(exist_ok=True)
        (in_tmp / name).touch()
    assert completion.recipes("q") == ["quickstart", "quick.toml"]
    assert completion.recipes("m") == ["mine.toml"]
    assert completion.recipes("f") == ["folder/"]
    assert completion.recipes("folder/") == ["folder/a.toml"]
    assert completion.recipes(".h") == [".hidden.toml"]
    assert {"hybrid", "mine.toml", "folder/"} < set(completion.recipes(""))
    assert ".hidden.toml" not in completion.recipes("")
    assert completion.recipes(f"{in_tmp}/m") == [f"{in_tmp}/mine.toml"]
    assert "/tmp/" in completion.recipes("/tm") or not Path("/tmp").is_dir()
    assert completion.recipes("[") == []
    assert completion.recipes("no/such/") == []
