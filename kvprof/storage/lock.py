"""One process at a time on one result, and a word on who it is to those that come second.

Writes a lock file, and beside it a small file that says who holds it; both go with the holder. What a killed process
left of them is taken over: the system lets go of a lock when its process dies. Does not know what is locked.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from kvprof.errors import OutputError
from kvprof.storage.processes import host_name, is_gone

HOLDER_BYTES = 65_536
"""Of the file beside a lock no more is read: it may be anybody's."""


class Lock:
    """A lock that is held by one process at a time, and dies with it.

    path: of the lock file. doing: what its holder does meanwhile, for who comes second: `is writing x.json`.
    """

    def __init__(self, path: Path, doing: str) -> None:
        from filelock import FileLock  # here, for commands that need no lock and must answer at once

        self._lock = FileLock(path)
        self._holder = path.with_name(path.name + ".holder")
        self._doing = doing

    def acquire(self) -> None:
        """Take the lock, its folder made; raises OutputError, saying who has it, and OSError."""
        from filelock import Timeout

        Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(self._held()) from None
        except NotImplementedError as error:  # older releases of filelock, where the file system has no locks
            raise OSError(0, str(error)) from None
        try:
            self._holder.write_text(json.dumps(_this_process()), encoding="utf-8")
        except OSError:  # a full disk: the lock holds all the same, and who comes second learns less
            with contextlib.suppress(OSError):
                self._holder.unlink()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back, and leave nothing behind."""
        # While it is still held, lest another's files be unlinked.
        for path in (self._holder, Path(self._lock.lock_file)):
            with contextlib.suppress(OSError):
                path.unlink()
        self._lock.release()

    def _held(self) -> str:
        holder = _read(self._holder)
        if holder is None:
            return f"another kvprof {self._doing}; wait for it, or use another --out."
        pid, host = holder["pid"], holder["host"]
        where = "" if host == host_name() else f" on {host}"
        return (
            f"another kvprof {self._doing}: process {pid} on {host}, since {holder['since']}: {holder['command']}\n"
            f"  Wait for it, stop it (`kill {pid}`{where}; what it measured is kept), or use another --out."
        )


def _this_process() -> dict[str, Any]:
    words = sys.argv[1:] if Path(sys.argv[0]).stem in ("kvprof", "__main__") else sys.argv
    return {
        "pid": os.getpid(),
        "host": host_name(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": shlex.join(["kvprof", *words] if words is not sys.argv else words),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """Return who holds a lock; None where the file does not say, or speaks of a process that is gone."""
    try:
        with open(path, "rb") as file:
            holder = json.loads(file.read(HOLDER_BYTES))
        told = isinstance(holder["pid"], int) and all(isinstance(holder[key], str) for key in _TEXTS)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not told or is_gone(holder["host"], holder["pid"]):
        return None
    return {"pid": holder["pid"], **{key: " ".join(holder[key].split())[:500] for key in _TEXTS}}


_TEXTS = ("host", "since", "command")
