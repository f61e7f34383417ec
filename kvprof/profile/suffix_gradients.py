"""Gradients of the last positions alone: what those before them would get is not computed.

A position's gradient is made of those of the positions after it, which alone read it. Where only the last ones are
wanted, half of a backward is spent for nothing. Does not know the loss, nor who wants the gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from kvprof.runtime.attention.patch import AttentionCall
from kvprof.runtime.attention.reference import run_queries


@contextlib.contextmanager
def suffix_gradients(rows: int, tokens: int, first: int) -> Iterator[None]:
    """Let products with weights send no gradient to positions before `first`; they take what else they get of others.

    For forwards of (rows, tokens) ids, and their backwards. A weight that asks for a gradient is left alone, and so is
    all that is not computed for (rows, tokens, channels) by torch's `linear`.
    """
    if not first:
        yield
        return
    with _Suffix(rows, tokens, first):
        yield


def attend_with_suffix(call: AttentionCall, first: int) -> tuple[Tensor | None, Tensor]:
    """Attend as the module does; return the outputs before `first`, that no gradient passes, and those from it on."""
    if not first:
        return None, call.run()
    # The kept ones first, lest what is soon let go leaves holes in memory before them.
    kept = run_queries(call, slice(first, call.query.shape[2]))
    with torch.no_grad():
        return run_queries(call, slice(first)), kept


class _Suffix(TorchFunctionMode):
    def __init__(self, rows: int, tokens: int, first: int) -> None:
        super().__init__()
        self.shape = rows, tokens
        self.first = first

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any other function of torch as it is."""
        if func is linear and self._is_of_positions(*args[:2]):
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return _Linear.apply(args[0], args[1], bias, self.first)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))

    def _is_of_positions(self, states: Tensor, weight: Tensor) -> bool:
        return (
            torch.is_grad_enabled()
            and states.requires_grad
            and states.shape[:-1] == self.shape
            and type(weight) in (Tensor, nn.Parameter)
            and not weight.requires_grad
        )


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
