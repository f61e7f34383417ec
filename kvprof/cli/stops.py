"""Being stopped from outside: Ctrl-C, or a scheduler's SIGTERM. Either ends a command with one line on how to go on.

Knows no command. Imports nothing that takes time: a signal may come while the rest is imported.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from kvprof.storage.processes import launched_size

SAID = "stopped. The same command goes on from the last finished piece, or begins again."
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C stopped, by the shells' convention (128 + SIGINT)."""
TERMINATED = 143
"""That of one that SIGTERM stopped."""
STOPPED = frozenset({INTERRUPTED, TERMINATED})

GRACE_SECONDS = 1.0
"""A terminal and a wrapper may both pass on one Ctrl-C: what follows within this time is the same; later, it kills."""


class Stopped(BaseException):
    """A signal asks this process to end. No KeyboardInterrupt, which click would answer in its own way."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def heed_signals() -> None:
    """Let SIGINT and SIGTERM raise Stopped, once, where they would end the process; ignored ones stay so.

    Of several processes that were launched together, SIGTERM ends each at once: one that waits for another in a
    library could not heed it.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    with contextlib.suppress(ValueError):  # in another thread than the first, signals are not ours
        if signal.getsignal(signal.SIGINT) in usual:
            signal.signal(signal.SIGINT, _stop)
        if signal.getsignal(signal.SIGTERM) in usual and launched_size() == 1:
            signal.signal(signal.SIGTERM, _stop)


def leave_in_peace() -> None:
    """Let signals no longer raise: the work is over, or is being left. One that comes later than at once kills."""
    again = functools.partial(_again, time.monotonic())
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is _stop:
                signal.signal(number, again)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    leave_in_peace()
    raise Stopped(number)


def _again(since: float, number: int, frame: FrameType | None) -> None:
    if time.monotonic() - since > GRACE_SECONDS:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def leave(stopped: Stopped) -> NoReturn:
    """End the process where no command could say so."""
    with contextlib.suppress(OSError):
        print(f"\n{SAID}", file=sys.stderr)
    raise SystemExit(stopped.exit_code)
