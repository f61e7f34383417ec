"""Stream W_k and W_v (with their biases and k_norm gains) out of a checkpoint, layer by layer.

Reads safetensors shards or a GGUF file, one tensor at a time, so that memory holds two matrices and never the model.
Does not know what is done with them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from kvprof.errors import ModelError, NonFiniteWeight
from kvprof.models.hub import refuse_pickles
from kvprof.models.inventory import NORM_ON_KEYS
from kvprof.models.layouts import Projection, Rows, choose_layout, cut_rows, find_projections
from kvprof.models.load import need_gguf
from kvprof.records.geometry import CacheGeometry, KVLayer

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PACKED = (".qweight", ".weight_packed", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
"""How the names end of tensors that only quantized checkpoints have: GPTQ and AWQ, compressed-tensors, bitsandbytes."""
_BEFORE_QUANTIZED = "Name the checkpoint that it was quantized from: its weights are what is measured."

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"


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


class Checkpoint(Protocol):
    """Named tensors on a disk."""

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""

    def read(self, name: str) -> Tensor:
        """Read one tensor, which nobody else keeps."""


class SafetensorsCheckpoint:
    """A folder of safetensors: one file, shards with an index, or shards alone.

    Raises ModelError for a folder without weights, a shard that is missing, truncated, corrupt or not what the index
    says.
    """

    def __init__(self, folder: Path) -> None:
        refuse_pickles((file.name for file in folder.iterdir()), str(folder))
        self._shard_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        promised = _promised(folder)
        whole = folder / SAFETENSORS
        shards = {folder / name for name in promised.values()} or folder.glob("*.safetensors")
        for shard in [whole] if whole.is_file() else sorted(shards):
            with _opened(shard) as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    self._shard_of[name] = shard
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
        for name, shard_name in promised.items():
            if name not in self._shard_of:
                raise ModelError(
                    f"{folder / SAFETENSORS_INDEX} says that {name} is in {shard_name}, but it is not.\n"
                    "  The index and the shards are of two different models, or of two versions: download both again."
                )

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """Read one tensor. The shard is mapped for this read alone, so that its pages leave memory with the tensor."""
        with _opened(self._shard_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


class GGUFCheckpoint:
    """A GGUF file, dequantized tensor by tensor; K rows are put back in the order that transformers uses.

    Raises ModelError where the file is not a GGUF one or is truncated, or where the package gguf is not installed.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        need_gguf()
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
            architecture = reader.fields["general.architecture"].contents()
        except (ValueError, KeyError, IndexError, OSError, TypeError) as error:
            raise ModelError(f"{path} is not a readable GGUF file: {error}.") from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        # llama.cpp stores the rows of rotary K heads pairwise interleaved, for the architectures it calls `llama`.
        self._kv_heads = config.num_key_value_heads if architecture == "llama" else None

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, outermost dimension first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        """Read one tensor as float32."""
        from gguf import dequantize

        tensor = self._tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(self.shape(name))
        if self._kv_heads and ".attn_k." in name:
            pairs = array.reshape(self._kv_heads, -1, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return torch.from_numpy(np.ascontiguousarray(array))


class LiveCheckpoint:
    """The parameters of a loaded model, under the names that they have there."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._parameters[name].shape)

    def read(self, name: str) -> Tensor:
        """Return one tensor, not a copy."""
        return self._parameters[name].detach()


def open_checkpoint(place: Path, config: PretrainedConfig) -> Checkpoint:
    """Open a folder of safetensors or a GGUF file."""
    return GGUFCheckpoint(place, config) if place.is_file() else SafetensorsCheckpoint(place)


def stream_projections(
    checkpoint: Checkpoint, geometry: CacheGeometry, config: PretrainedConfig
) -> Iterator[LayerWeights]:
    """Yield each scored layer's W_k and W_v, ascending by layer.

    config: the text decoder's. Raises UnknownLayout where the tensors cannot be cut, NonFiniteWeight, naming the
    tensor, for NaN or infinity, ModelError for quantized weights and for a shape that is not what the config says.
    """
    if not geometry.scored:
        raise ModelError(f"no layer keeps keys and values of its own: {geometry.layers[0].skipped}, and so on.")
    names = set(checkpoint.names)
    if packed := sorted(name for name in names if name.endswith(_PACKED)):
        raise ModelError(f"the checkpoint is quantized: it holds {packed[0]}.\n  {_BEFORE_QUANTIZED}")
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    projections = find_projections(modules, geometry)
    for layer in geometry.scored:
        projection = projections[layer.layer]
        if projection.is_fused:
            yield _cut_fused(checkpoint, names, projection, layer, int(config.num_attention_heads))
        else:
            yield LayerWeights(
                layer,
                key=_read(checkpoint, f"{projection.key}.weight", layer.key_width),
                value=_read(checkpoint, f"{projection.value}.weight", layer.value_width),
                key_bias=_read_if(checkpoint, names, f"{projection.key}.bias"),
                value_bias=_read_if(checkpoint, names, f"{projection.value}.bias"),
                key_gain=_key_gain(checkpoint, names, projection),
            )


def take_rows(tensor: Tensor, runs: Iterable[tuple[int, int]], dim: int = 0) -> Tensor:
    """Return the given (start, stop) runs of a tensor along `dim`, joined."""
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in runs], dim=dim)


def _cut_fused(
    checkpoint: Checkpoint, names: set[str], projection: Projection, layer: KVLayer, query_heads: int
) -> LayerWeights:
    name = f"{projection.key}.weight"
    layout = choose_layout(projection, checkpoint.shape(name), layer, query_heads)
    rows: Rows = cut_rows(layout, layer, query_heads)
    weight = _read(checkpoint, name)
    weight = weight.T if layout.transposed else weight
    bias = _read_if(checkpoint, names, f"{projection.key}.bias")
    return LayerWeights(
        layer,
        key=take_rows(weight, rows.key),
        value=take_rows(weight, rows.value),
        key_bias=None if bias is None else take_rows(bias, rows.key),
        value_bias=None if bias is None else take_rows(bias, rows.value),
        key_gain=_key_gain(checkpoint, names, projection),
    )


def _read(checkpoint: Checkpoint, name: str, rows: int | None = None) -> Tensor:
    shape = checkpoint.shape(name)
    if rows is not None and (len(shape) != 2 or shape[0] != rows):
        raise ModelError(
            f"{name} is {'x'.join(map(str, shape))}, but the config says {rows} rows.\n"
            "  The weights and the config.json are of two different models, or the weights are quantized."
        )
    tensor = checkpoint.read(name)
    if tensor.dtype not in _FLOATS:  # float8 among them: its scales stand in tensors of their own
        raise ModelError(f"{name} is quantized to {str(tensor.dtype).removeprefix('torch.')}.\n  {_BEFORE_QUANTIZED}")
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise NonFiniteWeight(
            f"{name} holds {int((~finite).sum())} NaN or infinite entries, so nothing can be measured on it.\n"
            "  The checkpoint is damaged; download it again."
        )
    return tensor


def _read_if(checkpoint: Checkpoint, names: set[str], name: str) -> Tensor | None:
    return _read(checkpoint, name) if name in names else None


def _key_gain(checkpoint: Checkpoint, names: set[str], projection: Projection) -> Tensor | None:
    """Read the weight of the norm after k_proj: `k_norm` beside `k_proj`, `attn_k_norm` in a GGUF file."""
    prefix = projection.attention + "."
    for name in sorted(names):
        if name.startswith(prefix) and name.endswith(".weight"):
            leaf = name.removeprefix(prefix).removesuffix(".weight")
            if NORM_ON_KEYS.match(leaf.removeprefix("attn_")):
                return _read(checkpoint, name)
    return None


def _promised(folder: Path) -> dict[str, str]:
    """Return what the index of a sharded checkpoint says: the shard of each tensor. Nothing where there is no index."""
    index = folder / SAFETENSORS_INDEX
    if (folder / SAFETENSORS).is_file() or not index.is_file():
        return {}
    try:
        promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(promised.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise ModelError(f"{index} is not an index of safetensors shards.\n  Download it again.") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise ModelError(f"{index} names the shard {shard!r}, which is outside its folder.")
        if not (folder / shard).is_file():
            raise ModelError(f"{index} names the shard {shard}, but it is not there.\n  Finish the download.")
    return dict(promised)


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard} is truncated or corrupt: {error}.\n  Download it again.") from None
