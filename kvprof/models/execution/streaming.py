"""A model larger than the memory: its weights stay in the checkpoint, and each block has them only while it runs.

Reads a checkpoint through transformers' own loading, all of it left on the disk. Does not know how a block is run with
weights that come and go (offload.py), nor what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvprof.errors import UnsupportedStreaming
from kvprof.models.execution.activation_offload import ActivationOffload
from kvprof.models.execution.offload import Unit, units_of
from kvprof.models.inventory import take_inventory
from kvprof.models.memory import return_freed_memory

Index = Mapping[str, Mapping[str, str]]
"""A weight's name in the model -> its `safetensors_file`, its `weight_name` there, and the `dtype` it is wanted in."""

_STORED = "stored_weight"
"""The attribute of a model that reads one of its weights, by name."""
_UNITS = "streamed_units"
"""The attribute that holds its units, by name."""


def stream_weights(
    model: PreTrainedModel, offload: ActivationOffload, device: torch.device, ahead: bool | None = None
) -> None:
    """Let a model whose weights transformers left on the disk load each block when it runs, and drop it afterwards.

    model: from `from_pretrained(device_map={"": "disk"})`, no parameter asking for a gradient. offload: for what comes
    into each block, until the way back. device: where blocks compute. ahead: read the next block while one computes, so
    that there are two in memory; by default on a GPU.
    Raises UnsupportedStreaming for a model whose blocks hand each other more than their output.
    """
    geometry = take_inventory(model.config).geometry
    if shared := [layer.layer for layer in geometry.layers if layer.kind == "shared"]:
        raise UnsupportedStreaming(
            f"layer {shared[0]} of {type(model).__name__} reads another layer's keys and values, and so its blocks "
            "cannot run one at a time.\n  Leave out --stream."
        )
    return_freed_memory()
    index = _index_of(model)
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    reader = _Reader(index, device, ahead if ahead is not None else device.type == "cuda")
    _leave_places(model, device)
    setattr(model, _UNITS, units_of(model, geometry, reader, offload))
    setattr(model, _STORED, reader.read_one)


def is_streamed(model: nn.Module) -> bool:
    """Whether a model has its weights only while it runs."""
    return hasattr(model, _STORED)


def streamed_units(model: nn.Module) -> dict[str, Unit]:
    """Return the units of a streamed model, by name."""
    units: dict[str, Unit] = getattr(model, _UNITS)
    return units


def _leave_places(model: nn.Module, device: torch.device) -> None:
    """Put in place of each weight what has its shape, dtype and device, and no memory: models ask weights for these.

    Whoever computes with it gets NaN.
    """
    places: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in places:
                number = torch.full(
                    (), torch.nan if weight.is_floating_point() else 0, dtype=weight.dtype, device=device
                )
                places[id(weight)] = nn.Parameter(number.expand(weight.shape), requires_grad=False)
            module._parameters[name] = places[id(weight)]


def _index_of(model: PreTrainedModel) -> Index:
    """Return where accelerate would read each weight from."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            found: Index = getattr(weights, "dataset", weights).index  # a hook's own are those of a prefix
            return found
    raise UnsupportedStreaming(f"{type(model).__name__} has no weights that are left on the disk.")


class _Reader:
    """Reads the weights of a unit; where it reads ahead, those of the one that comes next, too.

    The order is learnt: on the way there units follow each other as they did the first time, on the way back in turn.
    """

    def __init__(self, index: Index, device: torch.device, ahead: bool) -> None:
        self._index, self._device = index, device
        self._worker = ThreadPoolExecutor(1, "kvprof-weights") if ahead else None
        self._order: list[Unit] = []
        self._coming: tuple[Unit, Future[dict[str, Tensor]]] | None = None

    def take(self, unit: Unit, back: bool) -> dict[str, Tensor]:
        """Return a unit's weights by name, on the device. back: whether the unit before it comes next."""
        if self._worker is None:
            return self._read(unit)
        if unit not in self._order:
            self._order.append(unit)
        coming, self._coming = self._coming, None
        found = coming[1].result() if coming is not None and coming[0] is unit else self._read(unit)
        place = self._order.index(unit) + (-1 if back else 1)
        if 0 <= place < len(self._order):
            following = self._order[place]
            self._coming = following, self._worker.submit(self._read_aside, following)
        if self._device.type == "cuda":
            for tensor in found.values():  # made on another stream, and not to be reused there before we are done
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return found

    def read_one(self, name: str) -> Tensor:
        """Read a single weight, by its name in the model."""
        return self._read_names([name])[name]

    def _read(self, unit: Unit) -> dict[str, Tensor]:
        return self._read_names(unit.names)

    def _read_names(self, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Map the files for this one reading, so that their pages leave memory with the tensors."""
        files: dict[str, list[str]] = {}
        for name in wanted:
            files.setdefault(self._index[name]["safetensors_file"], []).append(name)
        found: dict[str, Tensor] = {}
        for file, names in files.items():
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    entry = self._index[name]
                    tensor = opened.get_tensor(entry["weight_name"])
                    found[name] = tensor.to(self._device, getattr(torch, entry["dtype"]))
        return found

    def _read_aside(self, unit: Unit) -> dict[str, Tensor]:
        if self._device.type != "cuda":
            return self._read(unit)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            found = self._read(unit)
            stream.synchronize()
        return found
