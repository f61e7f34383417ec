"""A model held in half precision that computes in float32: each block's weights are cast while it runs.

Half the memory of float32, and none of the rounding errors of half precision: the weights' own rounding is all that
remains, and of a checkpoint in half precision that is none. Reads a model, and leaves it as found. Does not know what
is measured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from kvprof.models.decoder import text_config
from kvprof.models.execution.offload import Unit, units_of
from kvprof.models.execution.streaming import is_streamed, streamed_units
from kvprof.models.inventory import take_inventory

HALF = (torch.bfloat16, torch.float16)

CAST_AT_ONCE = 2**22
"""Weights of the head that stand in float32 at a time: 16 MiB."""


@contextlib.contextmanager
def computing_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let a model in half precision compute in float32 while the `with` lasts; leave any other one alone.

    Of its blocks one at a time has float32 weights; a gradient goes back through them by running each once more. The
    token embedding casts the rows that are looked up, the head some rows at a time.
    model: no parameter asking for a gradient. One that accelerate keeps partly outside its device computes as it is.
    """
    parameters = list(model.parameters())
    if not any(parameter.dtype in HALF for parameter in parameters) or any(weight.is_meta for weight in parameters):
        yield
        return
    streamed = is_streamed(model)
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    units = streamed_units(model) if streamed else _held_units(model)
    head, rows = model.get_output_embeddings(), text_config(model.config).vocab_size
    try:
        for unit in units.values():
            module = unit.module
            if module is head and type(module) is nn.Linear:
                unit.compute = functools.partial(_linear, module)
            elif isinstance(module, nn.Embedding) and module.num_embeddings >= rows:
                unit.compute = functools.partial(_look_up, module, type(module).forward)
            else:
                unit.dtype = torch.float32
        yield
    finally:
        for unit in units.values():
            unit.dtype = unit.compute = None
        if not streamed:
            for module, own in before.items():
                module.__dict__.pop("forward", None)
                if own is not None:
                    module.forward = own


class _Held:
    """The weights where they are."""

    def take(self, unit: Unit, back: bool) -> Mapping[str, Tensor]:
        return unit.absent


class _OnDevice:
    """What comes into a block waits where it is."""

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    def take(self, kept: Tensor) -> Tensor:
        return kept.detach()


def _held_units(model: PreTrainedModel) -> dict[str, Unit]:
    geometry = take_inventory(model.config).geometry
    # Blocks that hand each other more than their output cannot run again one at a time: their graph keeps the casts.
    apart = all(layer.kind != "shared" for layer in geometry.layers)
    return units_of(model, geometry, _Held(), _OnDevice() if apart else None)


def _look_up(module: nn.Embedding, forward: Any, ids: Tensor) -> Tensor:
    """Return the rows of these ids in float32; a module that scales them does that in float32 too."""
    found, places = torch.unique(ids, return_inverse=True)
    whole = module._parameters["weight"]
    assert whole is not None
    try:
        module._parameters["weight"] = nn.Parameter(whole[found].float(), requires_grad=False)
        looked_up: Tensor = forward(module, places)
        return looked_up
    finally:
        module._parameters["weight"] = whole


def _linear(module: nn.Linear, given: Tensor) -> Tensor:
    product: Tensor = _WideLinear.apply(given, module.weight)  # type: ignore[no-untyped-call]
    return product if module.bias is None else product + module.bias.float()


class _WideLinear(torch.autograd.Function):
    """The product with a matrix in half precision, its rows cast to float32 some at a time."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor) -> Tensor:
        """given: (..., in), float32; weight: (out, in). Returns (..., out), float32."""
        ctx.save_for_backward(weight)  # and so let go by the backward, not with the graph
        return torch.cat([linear(given, rows.float()) for rows in _pieces(weight)], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of what was given; weights ask for none."""
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        total = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        start = 0
        for rows in _pieces(weight):
            total += gradient[..., start : start + len(rows)] @ rows.float()
            start += len(rows)
        return total, None


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, CAST_AT_ONCE // weight.shape[1]))
