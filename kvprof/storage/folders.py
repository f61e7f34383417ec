"""Folders: where results go, and what is made once and found again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path

from kvprof.errors import OutputError

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
