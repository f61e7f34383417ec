"""A weight matrix that is stored as codes and scales: its parts, checked by their headers before any is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprof.errors import ModelError, NonFiniteWeight
from kvprof.models.checkpoint.files import Checkpoint
from kvprof.models.checkpoint.shards import BEFORE_QUANTIZED

Settings = Mapping[str, Any]
"""What a config says of its quantization; from anywhere, so that no value is of a type that can be relied on."""


@dataclass(frozen=True)
class CodedMatrix:
    """How a matrix is read. kind: the format, in a few words. shape: (out_features, in_features).

    parts: the tensors that are read for it, whole, by name. decode: reads and dequantizes them, to `dtype`.
    """

    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    parts: tuple[str, ...]
    decode: Callable[[], Tensor]


class Parts:
    """The tensors of one module in a checkpoint, by the name that each has beside its module's."""

    def __init__(self, stored: Checkpoint, names: frozenset[str], module: str) -> None:
        self._stored, self._names = stored, names
        self.module = module

    def __contains__(self, leaf: str) -> bool:
        return self.name(leaf) in self._names

    def name(self, leaf: str) -> str:
        """Return a tensor's whole name."""
        return f"{self.module}.{leaf}"

    def names(self, *leaves: str) -> tuple[str, ...]:
        """Return the whole names of those of the tensors that are there."""
        return tuple(self.name(leaf) for leaf in leaves if leaf in self)

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._stored.shape(self.name(leaf))

    def dtype(self, leaf: str) -> str:
        """Return torch's name of a tensor's dtype; of one that is not there, nothing."""
        return self._stored.dtype(self.name(leaf)) if leaf in self else ""

    def need(self, leaf: str, *dtypes: str, dimensions: int | None = None) -> tuple[int, ...]:
        """Return a tensor's shape; raises ModelError where it is not there, or not of one of the dtypes."""
        if leaf not in self:
            raise self.wrong(f"{self.name(leaf)} is not there, which its numbers have to be multiplied by")
        shape, dtype = self.shape(leaf), self.dtype(leaf)
        if dtype not in dtypes:
            raise self.wrong(f"{self.name(leaf)} is {dtype}, not {' or '.join(dtypes)}")
        if 0 in shape:
            raise self.wrong(f"{self.name(leaf)} is {text(shape)}, which is empty")
        if dimensions is not None and len(shape) != dimensions:
            raise self.wrong(f"{self.name(leaf)} is {text(shape)}, no matrix")
        return shape

    def read(self, leaf: str) -> Tensor:
        """Read a tensor whole. Raises NonFiniteWeight for a float that is NaN or infinite."""
        tensor = self._stored.read(self.name(leaf))
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteWeight(
                f"{self.name(leaf)} holds NaN or infinite entries, so nothing can be measured on what it scales.\n"
                "  The checkpoint is damaged; download it again."
            )
        return tensor

    def wrong(self, what: str) -> ModelError:
        """Return the refusal of a module whose parts do not go together."""
        return ModelError(
            f"{self.module} is quantized in a way that kvprof cannot read: {what}.\n"
            f"  Download the checkpoint again if it is damaged. {BEFORE_QUANTIZED}"
        )


def text(shape: tuple[int, ...]) -> str:
    """Return a shape as 16x32."""
    return "x".join(map(str, shape)) or "a single number"


def whole_number(value: object, low: int, high: int) -> int | None:
    """Return a config's number where it is a whole one within bounds, else None."""
    return value if type(value) is int and low <= value <= high else None
