"""A run that is killed at any moment goes on to the same file. Many short lives are forked from one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import save_folder, save_text

KILLS = {(): 8, ("--stream",): 3}
"""The long run is tests/fuzz/hard_stops.py."""

LIVES = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import kvprof.profile.sensitivity, kvprof.report.tables, kvprof.analysis.stability
import transformers.models.llama.modeling_llama
from kvprof.cli.app import make_app

kills, seed, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
chance = random.Random(seed)

def live(folder, batches=None):
    # Killed at a random moment after this many batches.
    child = os.fork()
    if child == 0:
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            make_app(["gradients"])(["gradients", *command, "--out", folder])
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(77)
    if batches is not None:
        journal = f"{folder}/gradients.journal"
        while not (os.path.exists(journal) and open(journal, "rb").read().count(b"\\n") > batches):  # and its header
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                return 77  # done before it could be killed
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

status = live("whole")
assert status == 0, open("whole.log").read()
expected = open("whole/gradients.json", "rb").read()
resumed = 0
for number in range(kills):
    folder = f"killed-{number}"
    live(folder, chance.randrange(-1, 8))
    status = live(folder)
    said = open(f"{folder}.log").read()
    assert status == 0, said
    resumed += "went on with a stopped run" in said
    assert open(f"{folder}/gradients.json", "rb").read() == expected, folder
    assert sorted(os.listdir(folder)) == ["gradients.json"], os.listdir(folder)
print(resumed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
@pytest.mark.parametrize("stream", KILLS)
def test_a_run_killed_at_random_moments_goes_on_to_the_same_file(stream: tuple[str, ...], tmp_path: Path) -> None:
    save_folder(tmp_path / "model")
    text = save_text(tmp_path / "text.txt", rows=24)
    options = "--pack --sequences 16 --batch-size 2 --sequence-length 16 --recent-tokens 2 --sink-tokens 1"
    formats = ["--formats", "key:int2g4,value:int3g8"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LIVES,
            str(KILLS[stream]),
            "0",
            "model",
            "--data",
            str(text),
            *options.split(),
            *formats,
            *stream,
        ],
        cwd=tmp_path,
        env=os.environ | {"KVPROF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 0, "no kill came between two batches: none went on"
    assert not list((tmp_path / "cache").glob("stream/tmp*/*"))
