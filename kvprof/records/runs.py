"""Where results go and how they get there: output folders, atomic writes, the journal that lets a run resume.

Reads and writes files under `outputs/`; does not know what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvprof.errors import Mismatch, OutputError

OUTPUTS = Path("outputs")
"""Results go here, relative to where the command runs, unless `--out` says otherwise."""


def slug(model_id: str) -> str:
    """Return a folder name for a model id: readable, safe on every file system, distinct for distinct ids.

    An id of letters, digits, `.`, `_`, `-` with at most one `/` keeps its spelling (`org/name` becomes `org--name`);
    any other id, a local path among them, is its last part and six digits of its hash.
    """
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model_id, re.ASCII) and "--" not in model_id:
        return model_id.replace("/", "--")
    tail = re.sub(r"[^A-Za-z0-9._-]+", "-", model_id.rstrip("/").rsplit("/", 1)[-1]).strip(".-") or "model"
    return f"{tail[:80]}-{hashlib.sha256(model_id.encode()).hexdigest()[:6]}"


def output_folder(model_id: str, out: Path | None) -> Path:
    """Return the folder for a model's results, made and known to be writable; raises OutputError."""
    folder = out if out is not None else OUTPUTS / slug(model_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror}.\n  Name another folder with --out DIR."
        ) from None
    return folder


def write_atomically(path: str | Path, text: str) -> Path:
    """Write a text file so that no reader ever sees half of it; raises OutputError, leaving the old file as it was."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would hide the result from the user's group
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.\n  Name another folder with --out DIR.") from None
    return path


class Journal:
    """An append-only record of finished pieces of a long run, so that the same command goes on where it stopped.

    The first line holds the run's settings; each further line one finished piece: its key, its result and a checksum.
    A torn last line (a kill in mid-write) is dropped. Used as a context manager, it holds a lock on the file.

    Raises Mismatch on entry when the file's settings differ, naming the field, and OutputError when another process
    holds the lock or the folder cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], restart: bool = False) -> None:
        self.path = path
        self.settings = dict(settings)
        self.restart = restart
        self.done: dict[str, Any] = {}
        self._lock = FileLock(path.with_suffix(path.suffix + ".lock"))

    def __enter__(self) -> Journal:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(f"another kvprof is writing {self.path}; wait for it, or use another --out.") from None
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}.") from None
        try:
            if self.restart or not self._read():
                self.done = {}
                write_atomically(self.path, _line("settings", self.settings))
            self._file = open(self.path, "a", encoding="utf-8")
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._release()

    def add(self, key: str, result: object) -> None:
        """Record one finished piece, on the disk when this returns."""
        try:
            self._file.write(_line(key, result))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}.\n  Free some space; nothing is lost."
            ) from None
        self.done[key] = result

    def remove(self) -> None:
        """Delete the file: the run's result is written, nothing is left to resume."""
        self.path.unlink(missing_ok=True)

    def _release(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _read(self) -> bool:
        """Fill `done` from the file; return whether there was a usable one. Leaves the file ending on a whole line."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return False
        whole = 0
        settings: Any = None
        for line in raw.splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                break
            whole += len(line)
            key, result = entry
            if key == "settings":
                settings = result
            else:
                self.done[key] = result
        if settings is None:
            return False
        for field in sorted(settings.keys() | self.settings.keys()):
            if settings.get(field) != self.settings.get(field):
                raise Mismatch(
                    f"{self.path} is a stopped run with another {field}: it has {settings.get(field)!r}, "
                    f"this command {self.settings.get(field)!r}.\n"
                    "  Run the first command again to finish it, or add --restart to begin anew."
                )
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
    except (ValueError, UnicodeDecodeError):
        return None
