"""A checkpoint on the hub of which only parts are fetched: the headers of its shards, then the rows that are read.

Reads ranges of safetensors files, at the commit that `HubModel` names; writes nothing. Does not know which tensors
project keys and values.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprof.errors import ModelError
from kvprof.models.checkpoint.files import Runs, plain_bytes, share_of_rows
from kvprof.models.checkpoint.hub import HubModel, refuse_pickles
from kvprof.models.checkpoint.ranges import RangeReader
from kvprof.models.checkpoint.shards import (
    LENGTH_BYTES,
    SAFETENSORS_INDEX,
    Shards,
    StoredTensor,
    find_shards,
    header_bytes,
    parse_header,
    read_index,
)

_GUESSED_BYTES = 64 * 2**10
"""What is fetched of a file before its header's length is known: of a large one, most headers whole and no share of it.
Of a small one, a thousandth."""
_AT_ONCE = 8
"""Headers that are fetched at a time: each is a small answer after a long wait."""


@dataclass(frozen=True)
class Fetched:
    """How much of a checkpoint on the hub was fetched: bytes of its headers and tensors, of all its files' bytes."""

    fetched_bytes: int
    whole_bytes: int


def shards_on_hub(hub: HubModel) -> Shards:
    """Return the files of a repository that make its checkpoint. Raises ModelError as `find_shards` does."""
    where = f"{hub.id} on the hub"
    index = hub.folder / SAFETENSORS_INDEX
    names = [*(hub.weight_bytes or ()), *([index.name] if index.is_file() else [])]
    shards = find_shards(names, lambda: read_index(index), where)
    refuse_pickles(shards.files, where)  # there may be safetensors of a second name alone
    return shards


class RemoteCheckpoint:
    """Shards on the hub. Raises ModelError for one that is truncated, corrupt or not what the index says."""

    def __init__(self, hub: HubModel, shards: Shards) -> None:
        weight_bytes = hub.weight_bytes or {}
        self._hub_id = hub.id
        self._reader = RangeReader(hub.id, hub.commit)
        self._bytes_of = {shard: weight_bytes[shard] for shard in shards.files}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self._places = shards.places(pool.map(self._header, shards.files))

    @property
    def fetched(self) -> Fetched:
        """How much was fetched so far, of how much."""
        return Fetched(self._reader.fetched_bytes, sum(self._bytes_of.values()))

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
        """Fetch one tensor, or some of its rows, a request a run. Its dtype must be one that torch has."""
        shard, tensor = self._places[name]
        whole_bytes = tensor.stop_byte - tensor.start_byte
        row_bytes = whole_bytes // max(1, tensor.shape[0]) if tensor.shape else whole_bytes
        parts = [(0, whole_bytes)] if rows is None else [(start * row_bytes, stop * row_bytes) for start, stop in rows]
        content = bytearray(sum(stop - start for start, stop in parts))
        done = 0
        for start, stop in parts:
            self._reader.read_into(memoryview(content)[done : done + stop - start], shard, tensor.start_byte + start)
            done += stop - start
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.reshape(tensor.shape if rows is None else (-1, *tensor.shape[1:]))

    def _header(self, shard: str) -> dict[str, StoredTensor]:
        file_bytes = self._bytes_of[shard]
        guess = min(file_bytes, max(LENGTH_BYTES, min(_GUESSED_BYTES, file_bytes // 1000)))
        try:
            start = self._part(shard, 0, guess)
            end = LENGTH_BYTES + header_bytes(start, file_bytes)
            rest = self._part(shard, guess, max(guess, end))
            return parse_header((start + rest)[LENGTH_BYTES:end], file_bytes)
        except ValueError as error:
            raise ModelError(
                f"{shard} of {self._hub_id} on the hub is truncated or corrupt: {error}.\n"
                "  It was uploaded so: tell its authors, or name another model."
            ) from None

    def _part(self, shard: str, start_byte: int, stop_byte: int) -> bytes:
        content = bytearray(stop_byte - start_byte)
        self._reader.read_into(memoryview(content), shard, start_byte)
        return bytes(content)
