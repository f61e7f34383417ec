"""The peak memory and the time of one kvprof command, in a process of its own that has imported its libraries first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_RUN = """
import sys, threading, time
import psutil, datasets
import kvprof.profile.sensitivity, kvprof.report.tables, kvprof.analysis.stability
import transformers.models.llama.modeling_llama, transformers.models.qwen2.modeling_qwen2
from kvprof.cli.app import app
process = psutil.Process()
before = most = process.memory_info().rss
def watch():
    global most
    while True:
        most = max(most, process.memory_info().rss)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
start = time.monotonic()
try:
    app(sys.argv[1:])
except SystemExit as end:
    print(most - before, time.monotonic() - start)
    sys.exit(end.code)
"""


def run_watched(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command in a folder, what it keeps in a cache there; return the bytes over the imports, and the seconds."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *command],
        cwd=folder,
        env=os.environ | {"KVPROF_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak_bytes, seconds = map(float, done.stdout.split()[-2:])
    return peak_bytes, seconds
