"""Every failure of a command leaves as one message and the right exit code."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from kvprof.errors import KvprofError

P = ParamSpec("P")

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C stopped, by the shells' convention (128 + SIGINT)."""


class _Notes(logging.Handler):
    """Shows what the library logs as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        from kvprof.report.console import print_note

        print_note(record.getMessage())


def explains_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: a KvprofError becomes its message and exit code, Ctrl-C a line on how to go on."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        log = logging.getLogger("kvprof")
        if not log.handlers:
            log.addHandler(_Notes())
            log.setLevel(logging.INFO)
        try:
            command(*args, **kwargs)
        except KvprofError as error:
            from kvprof.report.console import print_error

            print_error(error)
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            from kvprof.report.console import print_error

            where = f"{error.filename}: " if error.filename else ""
            print_error(KvprofError(f"{where}{error.strerror or error}."))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            from kvprof.report.console import print_note

            print_note("\nstopped. The same command goes on from the last finished piece, or begins again.")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped
