"""A checkpoint whose quantized matrices are read as floats, under the names that plain weights have.

Wraps another checkpoint. Does not know which matrices are read, nor what is done with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvprof.models.checkpoint.files import Checkpoint, Runs
from kvprof.models.checkpoint.shards import FLOATS
from kvprof.models.quantized.bitsandbytes import bitsandbytes_matrix
from kvprof.models.quantized.compressed import compressed_matrix
from kvprof.models.quantized.fp8 import fp8_matrix
from kvprof.models.quantized.gptq import gptq_matrix
from kvprof.models.quantized.matrix import CodedMatrix, Parts, Settings
from kvprof.models.quantized.mlx import mlx_matrix
from kvprof.models.quantized.modelopt import modelopt_matrix

_CODES = (".weight_packed", ".qweight")
"""How the names end of codes that stand in the place of `.weight`."""

_FORMATS: tuple[Callable[[Parts, Settings], CodedMatrix | None], ...] = (
    gptq_matrix,
    bitsandbytes_matrix,
    mlx_matrix,
    compressed_matrix,
    modelopt_matrix,
    fp8_matrix,
)
"""The first that knows a matrix has it: FP8 is what is left."""

_HELD = 3
"""Times a matrix as float32 that decoding one takes at most: its codes unpacked, and its scales spread out."""


class DequantizedCheckpoint:
    """A checkpoint of which quantized matrices are dequantized as they are read; all else is read as it is stored.

    settings: what the model's config says of its quantization. Of a matrix that no format is known for, the dtype is
    that of its codes. Raises ModelError, when one is asked for, where the parts of a matrix do not go together.
    """

    def __init__(self, stored: Checkpoint, settings: Settings) -> None:
        self.stored = stored
        self._settings = settings
        self._names = frozenset(stored.names)
        self._found: dict[str, CodedMatrix | None] = {}

    @property
    def names(self) -> list[str]:
        """Every tensor's name; codes also under the name that the plain weight would have."""
        coded = (name.removesuffix(end) + ".weight" for name in self._names for end in _CODES if name.endswith(end))
        return [*self.stored.names, *(name for name in coded if name not in self._names)]

    def kind(self, name: str) -> str | None:
        """Return in which format a matrix is stored; None where it is stored as it is read."""
        matrix = self._matrix(name)
        return None if matrix is None else matrix.kind

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, of codes unpacked."""
        matrix = self._matrix(name)
        return self.stored.shape(name) if matrix is None else matrix.shape

    def dtype(self, name: str) -> str:
        """Return torch's name of the dtype that a tensor is read in."""
        matrix = self._matrix(name)
        return self.stored.dtype(name) if matrix is None else str(matrix.dtype).removeprefix("torch.")

    def stored_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of the checkpoint reading a tensor takes; a quantized one is read whole."""
        matrix = self._matrix(name)
        if matrix is None:
            return self.stored.stored_bytes(name, rows)
        return sum(self.stored.stored_bytes(part) for part in matrix.parts)

    def held_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of memory reading a tensor, or some of its rows, takes."""
        matrix = self._matrix(name)
        if matrix is None:
            return self.stored.held_bytes(name, rows)
        return self.stored_bytes(name) + _HELD * 4 * math.prod(matrix.shape)

    def read(self, name: str, rows: Runs | None = None) -> Tensor:
        """Read one tensor, or some of its rows joined, dequantized where it is quantized."""
        matrix = self._matrix(name)
        if matrix is None:
            return self.stored.read(name, rows)
        whole = matrix.decode()
        return whole if rows is None else torch.cat([whole[start:stop] for start, stop in rows])

    def _matrix(self, name: str) -> CodedMatrix | None:
        if name not in self._found:
            module, _, leaf = name.rpartition(".")
            parts = Parts(self.stored, self._names, module)
            found = (read(parts, self._settings) for read in _FORMATS) if leaf == "weight" else ()
            self._found[name] = next((matrix for matrix in found if matrix is not None), None)
        return self._found[name]


def dequantized(stored: Checkpoint, settings: Settings) -> Checkpoint:
    """Return a checkpoint that is read as floats: itself, where no matrix in it is quantized."""
    coded = any(
        name.endswith(_CODES) or (name.endswith(".weight") and stored.dtype(name) not in FLOATS)
        for name in stored.names
    )
    return DequantizedCheckpoint(stored, settings) if coded else stored


def as_stored(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint that the bytes come from."""
    return checkpoint.stored if isinstance(checkpoint, DequantizedCheckpoint) else checkpoint


def stored_kinds(checkpoint: Checkpoint, names: list[str]) -> tuple[str, ...]:
    """Return the formats that some tensors are quantized in, each once, in their order."""
    if not isinstance(checkpoint, DequantizedCheckpoint):
        return ()
    kinds = [checkpoint.kind(name) for name in names]
    return tuple(dict.fromkeys(kind for kind in kinds if kind is not None))
