"""Where results go and how they get there: output folders, atomic writes, the journal that lets a run resume.

Reads and writes files under `outputs/`; does not know what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvprof.errors import InvalidFile, Mismatch, OutputError, first_line
from kvprof.records.locks import Lock
from kvprof.records.processes import host_name, is_gone

OUTPUTS = Path("outputs")
"""Results go here, relative to where the command runs, unless `--out` says otherwise."""


RESERVED_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
"""A file of such a name is a device there, whatever its extension."""


_HASHED = re.compile(r"-[0-9a-f]{12}$", re.IGNORECASE)


def slug(model_id: str) -> str:
    """Return a folder name for a model id: readable, safe on every file system, distinct for distinct ids.

    An id of letters, digits, `.`, `_`, `-` with at most one `/` keeps its spelling (`org/name` becomes `org--name`);
    any other id, a local path among them, is its last part and twelve digits of its hash, and so is one that could be
    taken for such a name. Ids of the hub that differ in case alone, which it takes for one, are distinct where the file
    system tells them apart.
    """
    plain = re.fullmatch(r"[a-z0-9][\w.-]*(/[a-z0-9][\w.-]*)?", model_id, re.ASCII | re.IGNORECASE)
    odd = "--" in model_id or model_id.endswith(".") or len(model_id) > 120 or RESERVED_ON_WINDOWS.match(model_id)
    if plain and not odd and not _HASHED.search(model_id):
        return model_id.replace("/", "--")
    tail = re.sub(r"[^A-Za-z0-9._-]+", "-", model_id.rstrip("/").rsplit("/", 1)[-1]).strip(".-")
    if not tail or RESERVED_ON_WINDOWS.match(tail):
        tail = "model"
    return f"{tail[:80]}-{hashlib.sha256(model_id.encode(errors='surrogatepass')).hexdigest()[:12]}"


_ATTEMPTS = 50


def output_folder(model_id: str, out: Path | None) -> Path:
    """Return the folder for a model's results, known to be writable; raises OutputError. It is made with the first."""
    folder = out if out is not None else OUTPUTS / slug(model_id)
    try:
        for attempt in range(_ATTEMPTS):
            try:
                _write_nothing(folder)
                break
            except (FileNotFoundError, FileExistsError):  # another process does the same just now
                if attempt == _ATTEMPTS - 1:
                    raise
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror}.\n  Name another folder with --out DIR."
        ) from None
    return folder


def _write_nothing(folder: Path) -> None:
    """Make a folder and a file in it, and leave neither behind: a run that fails should not have been there."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()


def cache_folder() -> Path:
    """Return the folder for what is made once and found again: KVPROF_CACHE, else the user's own cache folder."""
    from platformdirs import user_cache_path  # here, for commands that keep nothing and must answer at once

    return Path(os.environ.get("KVPROF_CACHE") or user_cache_path("kvprof"))


def write_atomically(path: str | Path, text: str) -> Path:
    """Write a text file so that no reader ever sees half of it; raises OutputError, leaving the old file as it was."""
    path = Path(path)
    with replaced_when_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


@contextlib.contextmanager
def replaced_when_whole(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write; it takes that place when the `with` ends well, and is gone otherwise.

    A process that is killed meanwhile leaves a hidden file, which the next one to write that place removes.
    Raises OutputError where the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        # Named before it is there, so that no signal can come between the two and leave it behind.
        temporary = path.parent / f"{_prefix(path)}{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # 0600 would hide the result from the user's group
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return what to say where a file cannot be written: what is wrong, and what to do about it."""
    advice = "Name another folder with --out DIR."
    if error.errno in _FULL:
        advice = "Free some space and give the same command again: what is measured is kept."
    return OutputError(f"cannot write {path}: {error.strerror or first_line(error)}.\n  {advice}")


_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def _prefix(path: Path) -> str:
    """Return how the names of the files begin that this machine's processes write on the way to a path."""
    host = hashlib.sha256(host_name().encode(errors="surrogateescape")).hexdigest()[:6]
    return f".{path.name}.{host}-"


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed had begun to write in a path's place."""
    prefix = _prefix(path)
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            pid = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) and name.endswith(".tmp") else ""
            if pid.isdecimal() and is_gone(host_name(), int(pid)):
                os.unlink(path.parent / name)


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
