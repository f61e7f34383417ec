"""Failures of a command as one message and the right exit code."""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import ParamSpec

import typer

from kvprof.cli.stops import INTERRUPTED, SAID, Stopped
from kvprof.errors import KvprofError, OutOfMemory, UsageError, first_line, is_out_of_memory
from kvprof.storage.processes import launched_rank, launched_size

P = ParamSpec("P")

SHARED = frozenset({"gradients"})
"""Commands that may run as several processes."""

PATIENCE_SECONDS = 3.0
"""Seconds that a failed process waits for rank 0 to print the error: the first one to exit ends the others."""


MORE_MEMORY = (
    "Close what else holds memory, ask for less (shorter or fewer sequences at a time), or take a larger machine; "
    "what is measured so far is kept."
)


class _Notes(logging.Handler):
    """Shows what the library logs as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        from kvprof.report.console import print_note

        print_note(record.getMessage())


def explained(error: OSError) -> str:
    """Return what the system refused, where, and what to do about a full disk."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno != errno.ENOSPC:
        return f"{where}{error.strerror or error}."
    # Files are written whole or not at all, and say their name: without one, it is what stdout is written to.
    return f"{where or 'cannot print: '}{error.strerror}.\n  Free some space and give the same command again."


def explains_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: a KvprofError becomes its message and exit code, Ctrl-C or SIGTERM a line on how to go on."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        log = logging.getLogger("kvprof")
        if not log.handlers:
            log.addHandler(_Notes())
            log.setLevel(logging.INFO)
        try:
            if command.__name__ not in SHARED and launched_size() > 1:
                raise UsageError(
                    f"`kvprof {command.__name__}` runs in one process.\n"
                    "  Launch `gradients` as several, and this one without accelerate or torchrun."
                )
            command(*args, **kwargs)
        except KvprofError as error:
            from kvprof.report.console import print_error

            if not error.is_shared or launched_rank() == 0:
                print_error(error)
            else:
                time.sleep(PATIENCE_SECONDS)
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            from kvprof.report.console import print_error

            print_error(KvprofError(explained(error)))
            raise typer.Exit(1) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            from kvprof.report.console import print_error

            print_error(OutOfMemory(f"out of memory: {first_line(error)}\n  {MORE_MEMORY}"))
            raise typer.Exit(1) from None
        except (KeyboardInterrupt, Stopped) as stopped:
            from kvprof.report.console import print_note

            print_note(f"\n{SAID}")
            raise typer.Exit(getattr(stopped, "exit_code", INTERRUPTED)) from None

    return wrapped
