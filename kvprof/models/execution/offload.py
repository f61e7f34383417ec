"""A model whose modules have their weights only while they run, and go back by running once more.

Puts itself around the forward of modules. Does not know where the weights come from (streaming.py: the disk;
upcast.py: memory, in another dtype), nor what is measured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from kvprof.errors import ModelError
from kvprof.models.decoder import decoder_modules
from kvprof.models.layouts import block_stack, find_projections
from kvprof.records.geometry import CacheGeometry


class Weights(Protocol):
    """Where the weights of a unit come from."""

    def take(self, unit: Unit, back: bool) -> Mapping[str, Tensor]:
        """Return a unit's weights by name. back: whether it runs on the way back."""


class Waiting(Protocol):
    """Where what comes into a block waits for the way back."""

    def put(self, tensor: Tensor) -> Any:
        """Keep a tensor; return what it is taken back with."""

    def take(self, kept: Any) -> Tensor:
        """Return the tensor, as a leaf of its own."""


class Unit:
    """A module that has its weights only while it runs: a whole block, or another module's own.

    dtype: to cast floating-point weights to, or None to leave them. compute: what runs instead of the module's forward,
    its weights in place, or None for that forward.
    """

    def __init__(self, name: str, module: nn.Module, source: Weights, recurse: bool) -> None:
        self.module = module
        self.dtype: torch.dtype | None = None
        self.compute: Callable[..., Any] | None = None
        self._source = source
        prefix = f"{name}." if name else ""
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self.absent: dict[str, nn.Parameter] = {}
        for place, part in module.named_modules(remove_duplicate=False) if recurse else [("", module)]:
            for leaf, weight in part._parameters.items():
                if weight is not None:
                    key = prefix + (f"{place}." if place else "") + leaf
                    self._places[key], self.absent[key] = (part, leaf), weight

    @property
    def names(self) -> list[str]:
        """The weights' names in the model."""
        return list(self._places)

    @contextlib.contextmanager
    def present(self, back: bool = False) -> Iterator[None]:
        """Give the module its weights while the `with` lasts. back: whether it is run on the way back."""
        try:
            given = dict(self._source.take(self, back))
            for name in list(given):
                tensor = given.pop(name)  # what is cast need not stand beside what it is cast to
                part, leaf = self._places[name]
                if tensor.shape != self.absent[name].shape:
                    found, expected = ("x".join(map(str, weight.shape)) for weight in (tensor, self.absent[name]))
                    raise ModelError(
                        f"{name} is {found}, but the config says {expected}.\n"
                        "  The weights and the config.json are of two different models."
                    )
                if self.dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(self.dtype)
                part._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            yield
        finally:
            for name, (part, leaf) in self._places.items():
                part._parameters[leaf] = self.absent[name]


def units_of(
    model: PreTrainedModel, geometry: CacheGeometry, source: Weights, waiting: Waiting | None
) -> dict[str, Unit]:
    """Put a unit around each block, and around each module outside them that has weights; return them by name.

    waiting: for what comes into each block; None lets a graph keep all that blocks computed, as usual.
    """
    stack = block_stack(find_projections(decoder_modules(model), geometry))
    blocks = {f"{stack}.{name}": block for name, block in model.get_submodule(stack).named_children()}
    inside = {id(part) for block in blocks.values() for part in block.modules()}
    units = {}
    for name, module in model.named_modules():
        if name in blocks:
            units[name] = Unit(name, module, source, recurse=True)
            _put_around(module, units[name], waiting)
        elif id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
            units[name] = Unit(name, module, source, recurse=False)
            _put_around(module, units[name], None)
    return units


def _put_around(module: nn.Module, unit: Unit, waiting: Waiting | None) -> None:
    """Let a module's forward run with its weights in place; where its input can wait, go back by running it again."""
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if waiting is not None and torch.is_grad_enabled():
            return _run_twice(_Block(own, unit, waiting), args, kwargs)
        with unit.present():  # what a graph needs of it, the graph keeps
            return (unit.compute or own)(*args, **kwargs)

    module.forward = forward


@dataclass
class _Block:
    """A block's forward, its weights, and where its input waits for the way back."""

    forward: Callable[..., Any]
    weights: Unit
    waiting: Waiting


def _run_twice(block: _Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block without a graph, and once more with one when a gradient of its output arrives."""
    given, shape = tree_flatten((args, kwargs))
    asking = [place for place, leaf in enumerate(given) if isinstance(leaf, Tensor) and leaf.requires_grad]
    tensors = tuple(given[place] for place in asking)
    for place in asking:
        given[place] = None  # they wait elsewhere
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
        ctx.kept = [block.waiting.put(tensor) for tensor in tensors]
        with block.weights.present():
            return tuple(run(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Run again with a graph, and go back through it, where measuring may attend once more."""
        tensors = tuple(ctx.block.waiting.take(kept).requires_grad_() for kept in ctx.kept)
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
