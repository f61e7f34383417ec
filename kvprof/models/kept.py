"""What is made of a model once and found again: folders in the user's cache folder, whole or not there.

Writes there. Does not know what is made, nor of which model.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

LONGEST_NAME = 60


def made_once(folder: Path, make: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
    """Return a folder, made where it is not whole yet: by one process at a time, and put in its place when complete.

    make: fills a folder that is given to it. is_whole: whether a folder is what `make` has left.
    What a process that was killed had begun is removed. Raises what `make` does, and OSError for a place that cannot be
    written.
    """
    if is_whole(folder):
        return folder
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if is_whole(folder):  # made by another process meanwhile
            return folder
        for abandoned in cache.glob(f".{folder.name}.*"):  # the lock is ours, so nobody is at it
            shutil.rmtree(abandoned, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(dir=cache, prefix=f".{folder.name}."))
        try:
            make(partial)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def content_name(paths: Sequence[Path]) -> str:
    """Return a name for what is made of files: the first one's own, and a hash over all of their bytes.

    Names, sizes and times stay the same where a file is replaced or restored; its bytes are read at a gigabyte a
    second, and tell for certain.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", paths[0].stem).strip(".-")[:LONGEST_NAME]
    return f"{stem or 'model'}-{digest.hexdigest()[:24]}"
