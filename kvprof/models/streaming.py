"""A model larger than the memory: its weights stay in the checkpoint, and each block has them only while it runs.

Reads a checkpoint through transformers' own loading, all of it left on the disk; puts itself around the forward of
every module that has weights. A gradient goes back through the blocks one at a time, each run once more from what came
into it. Does not know what is measured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from kvprof.errors import ModelError, UnsupportedStreaming
from kvprof.models.inventory import take_inventory
from kvprof.models.layouts import block_stack, find_projections
from kvprof.models.memory import return_freed_memory
from kvprof.models.shelf import Shelf

Index = Mapping[str, Mapping[str, str]]
"""A weight's name in the model -> its `safetensors_file`, its `weight_name` there, and the `dtype` it is wanted in."""

_STORED = "stored_weight"
"""The attribute of a model that reads one of its weights, by name."""


def stream_weights(model: PreTrainedModel, shelf: Shelf, device: torch.device, ahead: bool | None = None) -> None:
    """Let a model whose weights transformers left on the disk load each block when it runs, and drop it afterwards.

    model: from `from_pretrained(device_map={"": "disk"})`, no parameter asking for a gradient. shelf: for what comes
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
    stack = block_stack(find_projections(dict(model.named_modules()), geometry))
    blocks = {f"{stack}.{name}": block for name, block in model.get_submodule(stack).named_children()}
    reader = _Reader(index, device, ahead if ahead is not None else device.type == "cuda")
    _leave_places(model, device)
    inside = {id(part) for block in blocks.values() for part in block.modules()}
    for name, module in model.named_modules():
        if name in blocks:
            _put_around(module, _Unit(name, module, reader, recurse=True), shelf)
        elif id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
            _put_around(module, _Unit(name, module, reader, recurse=False), None)
    setattr(model, _STORED, reader.read_one)


def is_streamed(model: nn.Module) -> bool:
    """Whether a model has its weights only while it runs."""
    return hasattr(model, _STORED)


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
        self._order: list[_Unit] = []
        self._coming: tuple[_Unit, Future[dict[str, Tensor]]] | None = None

    def take(self, unit: _Unit, back: bool) -> dict[str, Tensor]:
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

    def _read(self, unit: _Unit) -> dict[str, Tensor]:
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

    def _read_aside(self, unit: _Unit) -> dict[str, Tensor]:
        if self._device.type != "cuda":
            return self._read(unit)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            found = self._read(unit)
            stream.synchronize()
        return found


class _Unit:
    """A module that has its weights only while it runs: a whole block, or another module's own."""

    def __init__(self, name: str, module: nn.Module, reader: _Reader, recurse: bool) -> None:
        self._reader = reader
        prefix = f"{name}." if name else ""
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._absent: dict[str, nn.Parameter] = {}
        for place, part in module.named_modules(remove_duplicate=False) if recurse else [("", module)]:
            for leaf, weight in part._parameters.items():
                if weight is not None:
                    key = prefix + (f"{place}." if place else "") + leaf
                    self._places[key], self._absent[key] = (part, leaf), weight

    @property
    def names(self) -> list[str]:
        """The weights' names in the model."""
        return list(self._places)

    @contextlib.contextmanager
    def present(self, back: bool = False) -> Iterator[None]:
        """Give the module its weights while the `with` lasts. back: whether it is run on the way back."""
        for name, tensor in self._reader.take(self, back).items():
            part, leaf = self._places[name]
            if tensor.shape != self._absent[name].shape:
                found, expected = ("x".join(map(str, shape)) for shape in (tensor.shape, self._absent[name].shape))
                raise ModelError(
                    f"{name} is {found}, but the config says {expected}.\n"
                    "  The weights and the config.json are of two different models."
                )
            part._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        try:
            yield
        finally:
            for name, (part, leaf) in self._places.items():
                part._parameters[leaf] = self._absent[name]


def _put_around(module: nn.Module, unit: _Unit, shelf: Shelf | None) -> None:
    """Let a module's forward run with its weights in place; with a shelf, go back through it by running it again."""
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if shelf is not None and torch.is_grad_enabled():
            return _run_twice(_Block(own, unit, shelf), args, kwargs)
        with unit.present():  # what a graph needs of it, the graph keeps
            return own(*args, **kwargs)

    module.forward = forward


@dataclass
class _Block:
    """A block's forward, its weights, and where its input waits for the way back."""

    forward: Callable[..., Any]
    weights: _Unit
    shelf: Shelf


def _run_twice(block: _Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block without a graph, and once more with one when a gradient of its output arrives."""
    given, shape = tree_flatten((args, kwargs))
    asking = [place for place, leaf in enumerate(given) if isinstance(leaf, Tensor) and leaf.requires_grad]
    tensors = tuple(given[place] for place in asking)
    for place in asking:
        given[place] = None  # the shelf has it
    returned: list[Any] = []

    def run(tensors: tuple[Tensor, ...]) -> list[Any]:
        leaves = list(given)
        for place, tensor in zip(asking, tensors, strict=True):
            leaves[place] = tensor
        own_args, own_kwargs = tree_unflatten(leaves, shape)
        flat, spec = tree_flatten(block.forward(*own_args, **own_kwargs))
        returned[:] = [spec]
        return flat

    # Its own parameters ask for no gradient, and nothing may come before the first block: this leads back to it.
    anchor = torch.empty(0, requires_grad=True)
    flat = _Twice.apply(block, run, anchor, *tensors)  # type: ignore[no-untyped-call]
    return tree_unflatten(list(flat), returned[0])


class _Twice(torch.autograd.Function):
    """A block that keeps nothing for the way back but what came into it."""

    @staticmethod
    def forward(ctx: Any, block: _Block, run: Callable[..., list[Any]], anchor: Tensor, *tensors: Tensor) -> Any:
        """Run without a graph."""
        ctx.block, ctx.run = block, run
        ctx.kept = [block.shelf.put(tensor) for tensor in tensors]
        with block.weights.present():
            return tuple(run(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Run again with a graph, and go back through it, where measuring may attend once more."""
        tensors = tuple(ctx.block.shelf.take(kept).requires_grad_() for kept in ctx.kept)
        with ctx.block.weights.present(back=True):
            with torch.enable_grad():
                outputs = ctx.run(tensors)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and isinstance(output, Tensor) and output.requires_grad
            ]
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return None, None, None, *(tensor.grad for tensor in tensors)
