"""Whatever stops a command, and whenever: nothing half-written is seen, nothing measured is lost, all is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from folders import save_folder, save_text
from process_harness import COMMANDS, snapshot

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")

JOURNALS = {name: name for name in ("norms", "gradients", "spectra", "divergence", "calibrate")}
JOURNALS["evaluate"] = "evaluation"
OTHERS = [name for name in COMMANDS if name not in JOURNALS]
INT, TERM, KILL = (int(signal.SIGINT), int(signal.SIGTERM), 9)
CASES = [
    *((name, "piece", TERM if number % 2 else INT) for number, name in enumerate(JOURNALS)),
    *((name, "result", KILL) for name in COMMANDS),
    *((name, "result", INT if number % 2 else TERM) for number, name in enumerate(OTHERS)),
]
STOPPED = "stopped. The same command goes on from the last finished piece, or begins again."


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Live them all, in one process that has everything imported."""
    place = tmp_path_factory.mktemp("lives")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "process_harness.py"), json.dumps(CASES)],
        cwd=place,
        env=os.environ | {"KVPROF_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(map(str, CASES), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_stopped_command_leaves_whole_files_and_goes_on_to_the_same(
    case: tuple[str, str, int], lives: dict[str, dict[str, Any]]
) -> None:
    name, _, number = case
    life = lives[str(case)]
    assert life["half_written"] == life["gone"] == []
    assert life["again"] == 0, life["said_again"]
    assert life["differs"] == []
    assert "Traceback" not in life["said"] + life["said_again"]
    if number == KILL:
        assert life["status"] == -KILL
    else:
        assert life["status"] == 128 + number, life["said"]
        assert life["said"].endswith(f"\n{STOPPED}\n")
        assert [file for file in life["passing"] if not file.endswith(".journal")] == []
    if name in JOURNALS:
        assert f"out/{JOURNALS[name]}.journal" in life["passing"]
        assert "went on with a stopped run" in life["said_again"]


BLOCKED = """
import signal, sys
signal.signal(signal.SIGINT, {before})
sys.argv = ["kvprof", "show", "none.json"]
import kvprof.cli.app
def come(words):
    {comes}
    raise SystemExit("nothing came")
kvprof.cli.app.app_for = come
from kvprof.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("before", "comes", "code", "said"),
    [
        ("signal.default_int_handler", "signal.raise_signal(signal.SIGINT)", 130, STOPPED),
        ("signal.default_int_handler", "signal.raise_signal(signal.SIGTERM)", 143, STOPPED),
        ("signal.SIG_IGN", "signal.raise_signal(signal.SIGINT)", 1, "nothing came"),
    ],
)
def test_a_signal_is_heeded_before_there_is_a_command_and_an_ignored_one_never(
    before: str, comes: str, code: int, said: str
) -> None:
    script = BLOCKED.format(before=before, comes=comes)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip() == said


def test_a_ctrl_c_that_comes_twice_at_once_is_one() -> None:
    comes = "\n    ".join(
        [
            "try:",
            "    signal.raise_signal(signal.SIGINT)",
            "finally:",
            "    signal.raise_signal(signal.SIGINT)",
            "    signal.raise_signal(signal.SIGTERM)",
        ]
    )
    script = BLOCKED.format(before="signal.default_int_handler", comes=comes)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, STOPPED)


def test_a_second_one_later_ends_a_command_that_does_not_end() -> None:
    comes = "\n    ".join(
        [
            "import kvprof.cli.stops as stops",
            "stops.GRACE_SECONDS = -1",
            "try:",
            "    signal.raise_signal(signal.SIGTERM)",
            "finally:",
            "    signal.raise_signal(signal.SIGTERM)",
        ]
    )
    script = BLOCKED.format(before="signal.default_int_handler", comes=comes)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-TERM, "")


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["schema", "plan"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_result_that_cannot_be_printed_is_told(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "kvprof", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "cannot print: No space left on device." in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_missing_gpu_is_answered_with(in_tmp: Path) -> None:
    import torch
    from test_commands import run

    save_folder(in_tmp / "model")
    save_text(in_tmp / "text.txt", rows=24)
    for command in ("gradients", "allocate"):
        assert run(*COMMANDS[command]).exit_code == 0
    absent = f"cuda:{torch.cuda.device_count()}"
    before = snapshot(in_tmp)
    for command in (
        *(COMMANDS[name] for name in ("gradients", "spectra", "divergence", "calibrate", "evaluate")),
        ["generate", "text", "--plan", "out/plan.json", "--model", "model", "--max-new-tokens", "4"],
        ["benchmark", "out/plan.json", "model", "--context", "64"],
    ):
        result = run(*command, "--device", absent)
        assert result.exit_code == 2, result.output
        assert f"--device {absent} cannot be used here" in result.output
        assert "or take what is here: cpu" in result.output
    assert snapshot(in_tmp) == before
