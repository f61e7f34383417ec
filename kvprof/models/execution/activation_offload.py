"""Where tensors wait until they are needed again: in memory, and on the disk once that would be too many.

Writes files into a folder of its own, which goes when the process does. Does not know what the tensors are.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvprof.errors import OutputError
from kvprof.storage.folders import cache_folder

HELD_BYTES = 256 * 2**20
"""What may wait in memory."""


@dataclass(frozen=True)
class Kept:
    """A tensor that waits: itself, or the file that it is in."""

    tensor: Tensor | None
    file: Path | None
    device: torch.device


class ActivationOffload:
    """Tensors that wait, each taken once.

    held_bytes: what may wait in the CPU's memory; what comes later goes to the disk.
    """

    def __init__(self, held_bytes: int = HELD_BYTES) -> None:
        self._left = held_bytes
        self._number = 0
        self._folder: Path | None = None

    def put(self, tensor: Tensor) -> Kept:
        """Keep a tensor until it is taken; raises OutputError where the disk is full."""
        device, tensor = tensor.device, tensor.detach().cpu()
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            return Kept(tensor, None, device)
        self._number += 1
        file = self.folder / f"{self._number}.safetensors"
        try:
            save_file({"kept": tensor.contiguous()}, file)
        except Exception as error:  # safetensors has its own words for a full disk
            raise OutputError(
                f"cannot write {file}: {error}.\n  Free some space, or name another folder in KVPROF_CACHE."
            ) from None
        return Kept(None, file, device)

    def take(self, kept: Kept) -> Tensor:
        """Return a tensor where it was before, as a leaf of its own."""
        if kept.tensor is not None:
            self._left += kept.tensor.nbytes
            return kept.tensor.to(kept.device).detach()
        assert kept.file is not None
        tensor: Tensor = load_file(kept.file)["kept"].to(kept.device)
        kept.file.unlink(missing_ok=True)
        return tensor

    @property
    def folder(self) -> Path:
        """A folder for this process alone, made when it is first asked for."""
        if self._folder is None:
            self._folder = _own_folder(self)
        return self._folder


def _own_folder(owner: object) -> Path:
    """Make a folder that goes with its owner, at the latest with the process.

    Under the user's cache folder, since a temporary one may be memory. Folders that a killed process left are removed.
    """
    place = cache_folder() / "stream"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "making"):  # nobody sweeps what is being made
            _remove_abandoned(place)
            folder = Path(tempfile.mkdtemp(dir=place))
            lock = FileLock(folder.with_suffix(".lock"))
            lock.acquire(timeout=0)
    except OSError as error:
        raise OutputError(
            f"cannot write to {place}: {error.strerror}.\n  Name another folder in KVPROF_CACHE."
        ) from None
    weakref.finalize(owner, _remove, folder, lock)
    return folder


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def _remove_abandoned(place: Path) -> None:
    """Remove the folders whose process holds no lock on them any more."""
    for folder in [path for path in place.iterdir() if path.is_dir()]:
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        _remove(folder, lock)
