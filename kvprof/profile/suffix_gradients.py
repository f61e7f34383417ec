"""Gradients of the last positions alone: what those before them would get is not computed.

A position's gradient is made of those of the positions after it, which alone read it. Where only the last ones are
wanted, half of a backward is spent for nothing. Does not know the loss, nor who wants the gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kvprof.runtime.attention.patch import AttentionCall
from kvprof.runtime.attention.reference import run_queries


@contextlib.contextmanager
def suffix_gradients(model: nn.Module, rows: int, tokens: int, first: int) -> Iterator[None]:
    """Let a model's linear modules send no gradient to positions before `first`; others pass on what they get.

    For forwards of (rows, tokens) ids, and their backwards; what a module gets in another shape goes back whole. Left
    alone are subclasses of torch's module, those whose forward is someone else's already (weights that come and go),
    and weights that ask for a gradient.
    """
    chosen = [
        module
        for module in (model.modules() if first else ())
        if type(module) is nn.Linear and "forward" not in vars(module) and not module.weight.requires_grad
    ]
    try:
        for module in chosen:
            module.forward = functools.partial(_forward, module, (rows, tokens), first)  # type: ignore[method-assign]
        yield
    finally:
        for module in chosen:
            del module.forward


def attend_with_suffix(call: AttentionCall, first: int) -> tuple[Tensor | None, Tensor]:
    """Attend as the module does; return the outputs before `first`, that no gradient passes, and those from it on."""
    if not first:
        return None, call.run()
    # The kept ones first, lest what is soon let go leaves holes in memory before them.
    kept = run_queries(call, slice(first, call.query.shape[2]))
    with torch.no_grad():
        return run_queries(call, slice(first)), kept


def _forward(module: nn.Linear, shape: tuple[int, int], first: int, states: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and states.requires_grad and states.shape[:-1] == shape):
        return linear(states, module.weight, module.bias)
    found: Tensor = _Linear.apply(states, module.weight, module.bias, first)  # type: ignore[no-untyped-call]
    return found


class _Linear(torch.autograd.Function):
    """torch's `linear` of (B, T, channels), whose gradient is 0 before a position."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, first: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.first = first
        return linear(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        found = gradient.new_zeros(*gradient.shape[:2], weight.shape[1])
        found[:, ctx.first :] = gradient[:, ctx.first :] @ weight
        return found, None, None, None
