"""Commands of kvprof's, asked for one by one, each in a process forked from this one, which has everything imported.

Reads lines of JSON, [words, folder]; answers each with [exit code, what was said] when it is over. Imports are most of
what a short command takes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import process_harness

process_harness.prepare_imports()
for line in sys.stdin:
    words, folder = json.loads(line)
    print(json.dumps(process_harness.ended(process_harness.begin(words, Path(folder)))), flush=True)
