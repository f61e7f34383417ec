"""Checkpoints on a disk, and a loaded model as one: named tensors of which all or some rows can be read.

Reads safetensors and GGUF files, one tensor at a time. Does not know which tensors project keys and values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from kvprof.errors import ModelError
from kvprof.models.checkpoint.gguf_header import GGUFTensor
from kvprof.models.checkpoint.gguf_model import open_gguf
from kvprof.models.checkpoint.validation import read_headers

Runs = Sequence[tuple[int, int]]
"""Rows of a tensor, as (start, stop): each run is read at one go, in this order."""


_BITSANDBYTES = ("Params4bit", "Int8Params")
"""Classes of that package's quantized parameters."""


class Checkpoint(Protocol):
    """Named tensors, described by headers that are read already."""

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def dtype(self, name: str) -> str:
        """Return torch's name of the dtype that a tensor is read in."""

    def stored_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of the checkpoint reading a tensor, or some of its rows, takes."""

    def held_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of memory reading a tensor, or some of its rows, takes."""

    def read(self, name: str, rows: Runs | None = None) -> Tensor:
        """Read a tensor, or some of its rows joined; nobody else keeps it."""


class SafetensorsCheckpoint:
    """A folder of safetensors: one file, shards with an index, or shards alone.

    Raises ModelError for a folder without weights, a shard that is missing, truncated, corrupt or not what the index
    says.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places = read_headers(folder)

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""
        return self._places[name][1].shape

    def dtype(self, name: str) -> str:
        """Return torch's name of a tensor's dtype, from the header."""
        return self._places[name][1].dtype

    def stored_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of a shard a tensor, or some of its rows, takes."""
        tensor = self._places[name][1]
        return share_of_rows(tensor.stop_byte - tensor.start_byte, self, name, rows)

    def held_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of memory a tensor, or some of its rows, takes as it is read."""
        return plain_bytes(self, name, rows)

    def read(self, name: str, rows: Runs | None = None) -> Tensor:
        """Read one tensor. The shard is mapped for this read alone, so that its pages leave memory with the tensor."""
        with _opened(self._folder / self._places[name][0]) as file:
            if rows is None:
                tensor: Tensor = file.get_tensor(name)
                return tensor
            described = file.get_slice(name)
            return torch.cat([described[start:stop] for start, stop in rows])


class GGUFCheckpoint:
    """A GGUF model, in one file or in parts, dequantized tensor by tensor.

    K rows are put back in the order that transformers uses.

    Raises ModelError where the file is not a GGUF one or is truncated, or where the package gguf is not installed.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        model = open_gguf(path)
        self._tensors = model.tensors
        # llama.cpp stores the rows of rotary K heads pairwise interleaved, for the architectures it calls `llama`.
        self._kv_heads = config.num_key_value_heads if model.architecture == "llama" else None

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, outermost dimension first."""
        return tuple(reversed(self._tensors[name][1].shape))

    def dtype(self, name: str) -> str:
        """Return what every tensor is dequantized to."""
        return "float32"

    def stored_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of the file a tensor, or some of its rows, takes as it is stored."""
        tensor = self._tensors[name][1]
        return share_of_rows(tensor.stop_byte - tensor.start_byte, self, name, rows)

    def held_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of memory a tensor, or some of its rows, takes as it is read."""
        return plain_bytes(self, name, rows)

    def read(self, name: str, rows: Runs | None = None) -> Tensor:
        """Read one tensor, or some of its rows, as float32."""
        from gguf import GGMLQuantizationType, dequantize

        path, tensor = self._tensors[name]
        shape = self.shape(name)
        reordered = self._kv_heads is not None and ".attn_k." in name
        # Of reordered rows, those that are asked for stand elsewhere in the file.
        part = None if reordered else rows
        kind = GGMLQuantizationType(tensor.type)
        try:
            array = dequantize(_gguf_bytes(path, tensor, shape, part), kind).astype(np.float32).reshape(-1, *shape[1:])
        except NotImplementedError:
            raise ModelError(f"{path}: {name} is stored as {kind.name}, which cannot be read.") from None
        if reordered:
            pairs = array.reshape(self._kv_heads, -1, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
            array = array if rows is None else np.concatenate([array[i:j] for i, j in rows])
        return torch.from_numpy(np.ascontiguousarray(array))


class LiveCheckpoint:
    """The parameters of a loaded model, under the names that they have there."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        for name, parameter in list(self._parameters.items()):
            if type(parameter).__name__ in _BITSANDBYTES:  # whose scales are attributes of the parameter
                module, _, _ = name.rpartition(".")
                state = model.get_submodule(module).state_dict()
                self._parameters |= {f"{module}.{leaf}": tensor for leaf, tensor in state.items()}

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._parameters[name].shape)

    def dtype(self, name: str) -> str:
        """Return torch's name of a tensor's dtype."""
        return str(self._parameters[name].dtype).removeprefix("torch.")

    def stored_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of memory a tensor, or some of its rows, takes."""
        return share_of_rows(self._parameters[name].nbytes, self, name, rows)

    def held_bytes(self, name: str, rows: Runs | None = None) -> int:
        """Return how many bytes of memory a tensor, or some of its rows, takes as it is read."""
        return plain_bytes(self, name, rows)

    def read(self, name: str, rows: Runs | None = None) -> Tensor:
        """Return one tensor, not a copy; of some rows that are several runs, one."""
        tensor = self._parameters[name].detach()
        if rows is None:
            return tensor
        parts = [tensor[start:stop] for start, stop in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gguf_bytes(path: Path, tensor: GGUFTensor, shape: tuple[int, ...], rows: Runs | None) -> np.ndarray[Any, Any]:
    """Return a tensor's bytes, those of each row in one, of all rows or of some."""
    size = tensor.stop_byte - tensor.start_byte
    count = math.prod(shape[:-1])
    mapped = np.memmap(path, np.uint8, "r", tensor.start_byte, (count, size // count))
    # Rows of the outermost dimension. In memory: the file is mapped for this read alone.
    outer = mapped.reshape(shape[0] if len(shape) > 1 else 1, -1, mapped.shape[-1])
    if rows is None or len(shape) < 2:
        return np.array(mapped)
    return np.concatenate([outer[i:j] for i, j in rows]).reshape(-1, mapped.shape[-1])


def share_of_rows(whole_bytes: int, checkpoint: Checkpoint, name: str, rows: Runs | None) -> int:
    """Return how many of a tensor's bytes some of its rows are; of all rows, `whole_bytes`."""
    if rows is None:
        return whole_bytes
    return whole_bytes * sum(stop - start for start, stop in rows) // max(1, checkpoint.shape(name)[0])


def plain_bytes(checkpoint: Checkpoint, name: str, rows: Runs | None) -> int:
    """Return how many bytes a tensor, or some of its rows, takes in the dtype that it is read in."""
    itemsize: int = getattr(torch, checkpoint.dtype(name)).itemsize
    return share_of_rows(math.prod(checkpoint.shape(name)) * itemsize, checkpoint, name, rows)


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard} is truncated or corrupt: {error}.\n  Download it again.") from None
