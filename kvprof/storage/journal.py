"""The journal of a run: its finished pieces, so that the same command goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvprof.errors import InvalidFile, Mismatch
from kvprof.storage.atomic import cannot_write, write_atomically
from kvprof.storage.lock import Lock

LONGEST_LINE_BYTES = 2**28
"""Of a journal: a finished piece takes megabytes at most, and a longer line was not written by this class."""


class Journal:
    """An append-only record of finished pieces of a long run, so that the same command goes on where it stopped.

    The first line holds the run's settings; each further line one finished piece: its key, its result and a checksum.
    A torn last line (a kill in mid-write) is dropped, and so is all that follows an altered one. Results come back as
    JSON has them, tuples as lists, in the run that made them too. Used as a context manager, it locks the file.

    Raises Mismatch on entry when the file's settings differ, naming the field, and OutputError when another process
    holds the lock or the folder cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], restart: bool = False) -> None:
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.restart = restart
        self.done: dict[str, Any] = {}
        self._lock = Lock(path.with_suffix(path.suffix + ".lock"), f"is writing {path}")

    def __enter__(self) -> Journal:
        try:
            self._lock.acquire()
        except OSError as error:
            raise cannot_write(self.path, error) from None
        try:
            if self.restart or not self._read():
                self.done = {}
                write_atomically(self.path, _line("settings", self.settings))
            self._file = open(self.path, "a", encoding="utf-8", newline="\n")
        except OSError as error:
            self._lock.release()
            raise cannot_write(self.path, error) from None
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError):  # what add() could not write, it has said
            self._file.close()
        if kind is not None and issubclass(kind, Exception) and not self.done:
            # Failed before its first piece: nothing to go on with that would forbid to try other settings.
            with contextlib.suppress(OSError):
                self.remove()
        self._lock.release()

    def add(self, key: str, result: object) -> None:
        """Record one finished piece, on the disk when this returns."""
        line = _line(key, result)
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.done[key] = json.loads(line.split(" ", 1)[1])[1]

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Raise InvalidFile where reading `done` fails: its lines are whole, and not what this command writes."""
        try:
            yield
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            raise InvalidFile(
                f"{self.path} does not hold what this command measures.\n  Add --restart to begin anew."
            ) from None

    def check_numbers(self) -> None:
        """Raise InvalidFile unless every result is one finite number."""
        with self.understood():
            if not all(type(result) is float and math.isfinite(result) for result in self.done.values()):
                raise ValueError

    def remove(self) -> None:
        """Delete the file: the run's result is written, nothing is left to resume."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> bool:
        """Fill `done` from the file; return whether there was a usable one. Leaves the file ending on a whole line."""
        whole, entries = 0, []
        try:
            with open(self.path, "rb") as file:
                while (entry := _parse(line := file.readline(LONGEST_LINE_BYTES))) is not None:
                    whole += len(line)
                    entries.append(entry)
        except FileNotFoundError:
            return False
        if not entries:
            return False
        (_, settings), *pieces = entries
        if not isinstance(settings, dict):
            return False
        for field in dict.fromkeys([*self.settings, *settings]):  # in the order they were given
            if settings.get(field) != self.settings.get(field):
                raise Mismatch(
                    f"{self.path} is a stopped run with another {field}: it has {settings.get(field)!r}, "
                    f"this command {self.settings.get(field)!r}.\n"
                    "  Run the first command again to finish it, or add --restart to begin anew."
                )
        self.done = dict(pieces)
        os.truncate(self.path, whole)
        return True


def _line(key: str, result: object) -> str:
    body = json.dumps([key, result])
    return f"{hashlib.sha256(body.encode()).hexdigest()[:16]} {body}\n"


def _parse(line: bytes) -> tuple[str, Any] | None:
    """Return a journal line's key and result, or None for one that is torn or altered."""
    try:
        checksum, body = line.decode().split(" ", 1)
        body = body.removesuffix("\n")
        if not line.endswith(b"\n") or hashlib.sha256(body.encode()).hexdigest()[:16] != checksum:
            return None
        key, result = json.loads(body)
        return str(key), result
    except (ValueError, TypeError, RecursionError):  # of UnicodeDecodeError, too
        return None
