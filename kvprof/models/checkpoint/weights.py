"""Stream W_k and W_v (with their biases and k_norm gains) out of a checkpoint, layer by layer.

Reads a checkpoint's headers, then of each layer only what is K or V, so that memory holds two matrices and never the
model. Does not know where the checkpoint is, nor what is done with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from kvprof.errors import ModelError, NonFiniteWeight
from kvprof.models.checkpoint.files import Checkpoint, Runs
from kvprof.models.checkpoint.shards import FLOATS, quantized
from kvprof.models.decoder import other_parts, query_heads, text_config
from kvprof.models.layouts import Projection, Rows, choose_layout, cut_rows, find_projections
from kvprof.models.quantized.checkpoint import stored_kinds
from kvprof.models.skeleton import NORM_ON_KEYS
from kvprof.records.geometry import CacheGeometry, KVLayer


@dataclass(frozen=True)
class LayerWeights:
    """One layer's projections, in the checkpoint's dtype.

    key: (kv_heads * key_head_dim, in_features). value: (kv_heads * value_head_dim, in_features).
    Biases have one entry a row; key_gain is the stored weight of the norm after k_proj.
    """

    layer: KVLayer
    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    value_bias: Tensor | None
    key_gain: Tensor | None


@dataclass(frozen=True)
class FusedCut:
    """How K and V are cut out of one matrix.

    read: the rows that are read, adjacent runs as one; None where the matrix is stored (in, out), and read whole.
    of_read: where K and V stand in what was read; of_whole: where in the matrix, and in its bias.
    """

    read: Runs | None
    of_read: Rows
    of_whole: Rows


@dataclass(frozen=True)
class LayerReads:
    """The tensors that one layer is read from, by name. cut: where key and value are rows of one matrix."""

    layer: KVLayer
    key: str
    value: str
    key_bias: str | None
    value_bias: str | None
    key_gain: str | None
    cut: FusedCut | None = None

    @property
    def tensors(self) -> dict[str, Runs | None]:
        """Each tensor with the rows that are read of it; None is all."""
        whole = (self.key, self.value, self.key_bias, self.value_bias, self.key_gain)
        reads: dict[str, Runs | None] = {name: None for name in whole if name is not None}
        return reads | ({} if self.cut is None else {self.key: self.cut.read})


class Projections:
    """Every scored layer's W_k and W_v in a checkpoint, ascending by layer: found by the headers, read one by one.

    config: the model's. Raises UnknownLayout where the tensors cannot be cut, ModelError for quantized weights
    and for a shape that is not what the config says; all of it before anything is read.
    """

    def __init__(self, checkpoint: Checkpoint, geometry: CacheGeometry, config: PretrainedConfig) -> None:
        self._checkpoint = checkpoint
        self._names = set(checkpoint.names)
        modules = {name.removesuffix(".weight") for name in self._names if name.endswith(".weight")}
        found = find_projections(modules, geometry, beside=other_parts(config))
        fused = any(each.is_fused for each in found.values())
        heads = query_heads(text_config(config)) if fused else 0
        self.layers = tuple(self._reads(layer, found[layer.layer], heads) for layer in geometry.scored)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The formats that projections are quantized in, in the checkpoint; none where they are plain."""
        return stored_kinds(self._checkpoint, [name for reads in self.layers for name in (reads.key, reads.value)])

    def stored_bytes(self, reads: LayerReads) -> int:
        """Return how many bytes of the checkpoint reading a layer takes: none where an earlier one runs its block."""
        if reads.layer.block_of is not None:
            return 0
        return sum(self._checkpoint.stored_bytes(name, rows) for name, rows in reads.tensors.items())

    def held_bytes(self, reads: LayerReads) -> int:
        """Return how many bytes of memory a layer takes as it is read, unpacked where the checkpoint is quantized."""
        return sum(self._checkpoint.held_bytes(name, rows) for name, rows in reads.tensors.items())

    def read(self, reads: LayerReads) -> LayerWeights:
        """Read one layer. Raises NonFiniteWeight, naming the tensor, for NaN or infinity."""
        key_gain = self._read(reads.key_gain)
        key_bias, value_bias = self._read(reads.key_bias), self._read(reads.value_bias)
        cut = reads.cut
        if cut is None:
            return LayerWeights(
                reads.layer, self._read_rows(reads.key), self._read_rows(reads.value), key_bias, value_bias, key_gain
            )
        weight = self._read_rows(reads.key, cut.read)
        weight = weight.T if cut.read is None else weight
        return LayerWeights(
            reads.layer,
            key=take_rows(weight, cut.of_read.key),
            value=take_rows(weight, cut.of_read.value),
            key_bias=None if key_bias is None else take_rows(key_bias, cut.of_whole.key),
            value_bias=None if value_bias is None else take_rows(value_bias, cut.of_whole.value),
            key_gain=key_gain,
        )

    def _reads(self, layer: KVLayer, projection: Projection, query_heads: int) -> LayerReads:
        key, value = f"{projection.key}.weight", f"{projection.value}.weight"
        beside = (self._if_there(f"{projection.key}.bias"), self._if_there(f"{projection.value}.bias"))
        cut = None
        if projection.is_fused:
            layout = choose_layout(projection, self._checkpoint.shape(key), layer, query_heads)
            cut = _cut(cut_rows(layout, layer, query_heads), bool(layout.transposed))
        else:
            self._check_shape(key, layer.key_width)
            self._check_shape(value, layer.value_width)
        reads = LayerReads(layer, key, value, *beside, self._key_gain(projection), cut)
        for name in reads.tensors:
            if (dtype := self._checkpoint.dtype(name)) not in FLOATS:
                raise quantized(name, dtype)
        return reads

    def _check_shape(self, name: str, rows: int) -> None:
        shape = self._checkpoint.shape(name)
        if len(shape) != 2 or shape[0] != rows:
            raise ModelError(
                f"{name} is {'x'.join(map(str, shape))}, but the config says {rows} rows.\n"
                "  The weights and the config.json are of two different models, or the weights are quantized."
            )

    def _if_there(self, name: str) -> str | None:
        return name if name in self._names else None

    def _key_gain(self, projection: Projection) -> str | None:
        """Name the weight of the norm after k_proj: `k_norm` beside `k_proj`, `attn_k_norm` in a GGUF file."""
        prefix = projection.attention + "."
        for name in sorted(self._names):
            if name.startswith(prefix) and name.endswith(".weight"):
                leaf = name.removeprefix(prefix).removesuffix(".weight")
                if NORM_ON_KEYS.match(leaf.removeprefix("attn_")):
                    return name
        return None

    def _read(self, name: str | None) -> Tensor | None:
        return None if name is None else self._read_rows(name)

    def _read_rows(self, name: str, rows: Runs | None = None) -> Tensor:
        tensor = self._checkpoint.read(name, rows)
        ends = tensor.aminmax() if tensor.numel() else ()  # NaN if any entry is; far cheaper than isfinite of them all
        if not all(math.isfinite(end) for end in ends):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteWeight(
                f"{name} holds {bad} NaN or infinite entries, so nothing can be measured on it.\n"
                "  The checkpoint is damaged; download it again."
            )
        return tensor


def stream_projections(
    checkpoint: Checkpoint, geometry: CacheGeometry, config: PretrainedConfig
) -> Iterator[LayerWeights]:
    """Yield each scored layer's W_k and W_v, ascending by layer. Raises what `Projections` does."""
    projections = Projections(checkpoint, geometry, config)
    yield from map(projections.read, projections.layers)


def take_rows(tensor: Tensor, runs: Iterable[tuple[int, int]], dim: int = 0) -> Tensor:
    """Return the given (start, stop) runs of a tensor along `dim`, joined."""
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in runs], dim=dim)


def _cut(rows: Rows, transposed: bool) -> FusedCut:
    """Leave the queries unread, where rows lie together."""
    if transposed:
        return FusedCut(None, rows, rows)
    read: list[tuple[int, int]] = []
    place: dict[tuple[int, int], tuple[int, int]] = {}
    taken = 0
    for start, stop in sorted(rows.key + rows.value):
        place[start, stop] = (taken, taken + stop - start)
        taken += stop - start
        if read and read[-1][1] == start:
            start = read.pop()[0]
        read.append((start, stop))
    of_read = Rows(tuple(place[run] for run in rows.key), tuple(place[run] for run in rows.value))
    return FusedCut(tuple(read), of_read, rows)
