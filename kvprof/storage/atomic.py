"""Files that no reader sees half written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from kvprof.errors import OutputError, first_line
from kvprof.storage.processes import host_name, is_gone


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
