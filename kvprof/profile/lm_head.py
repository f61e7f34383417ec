"""From the last block's output to a loss and back, some positions at a time.

The logits of a long text, and their gradient, take more memory than the model's largest block: here they never stand
whole. Reads a model and its inputs. Does not know what the loss is, nor what is measured on the way back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from kvprof.errors import ModelError
from kvprof.models.decoder import text_config

LOGITS_AT_ONCE = 2**22
"""Logits that are held at a time: 16 MiB in float32, and as much for each of their gradients."""
FEWEST_POSITIONS = 16


class Head:
    """A model run up to its head, ready to be asked for the logits of any of its positions.

        head = Head(model, input_ids=ids, attention_mask=mask)
        for start, stop in head.chunks(0, tokens):
            loss(head.run(start, stop, input_ids=ids[:, start:stop]).logits).backward()
        head.backward()

    The head is the model's own: what its forward does after its decoder, scaling and capping of logits included.
    """

    def __init__(self, model: PreTrainedModel, **inputs: Any) -> None:
        """Run the decoder. inputs: as the model's forward takes them."""
        self._model = model
        self._decoder, self._output = _run_decoder(model, inputs)
        self._hidden_BTH: Tensor = self._output["last_hidden_state"]
        self._leaf = self._hidden_BTH.detach().requires_grad_()

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the (start, stop) of runs of positions whose logits may stand at a time."""
        vocabulary = text_config(self._model.config).vocab_size
        step = max(FEWEST_POSITIONS, LOGITS_AT_ONCE // (vocabulary * self._hidden_BTH.shape[0]))
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def run(self, start: int, stop: int, **inputs: Any) -> Any:
        """Return what the model's forward does for these positions alone: logits, and a loss where it gets labels."""
        # Copied, because torch multiplies a view of a single sequence as a batch, and for that copies the whole head.
        hidden_BTH = self._leaf[:, start:stop].clone(memory_format=torch.contiguous_format)
        chunk = type(self._output)(**{**self._output, "last_hidden_state": hidden_BTH})
        with _returning(self._decoder, chunk):
            return self._model(**inputs)

    def backward(self) -> None:
        """Send what the losses of all chunks left at the last block's output back through the blocks."""
        if self._leaf.grad is not None:
            self._hidden_BTH.backward(self._leaf.grad)  # type: ignore[no-untyped-call]


class _Reached(Exception):
    """Not an error: carries a module and what it returned out of the forward around it."""


def _run_decoder(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[nn.Module, ModelOutput]:
    """Return what the outermost model within the model returns, called as the model's forward calls it, and which.

    Of a wrapper around a model with a head of its own it is the decoder in that one, whose output has no logits yet.
    """
    entered = 0
    without_head: tuple[nn.Module, ModelOutput] | None = None

    def enter(module: nn.Module, arguments: Any) -> None:
        nonlocal entered
        entered += 1

    def leave(module: nn.Module, arguments: Any, output: ModelOutput) -> None:
        nonlocal entered, without_head
        entered -= 1
        if isinstance(output, ModelOutput) and "last_hidden_state" in output:
            without_head = module, output
        if not entered and without_head is not None:
            raise _Reached(*without_head)

    handles = []
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model:
            handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        model(**inputs)
    except _Reached as reached:
        decoder, output = reached.args
        return decoder, output
    finally:
        for handle in handles:
            handle.remove()
    raise ModelError(f"{type(model).__name__} has no decoder of its own that its head could be told from.")


@contextlib.contextmanager
def _returning(module: nn.Module, output: ModelOutput) -> Iterator[None]:
    """Let a module return this, whatever it is called with, while the `with` lasts."""
    own = module.__dict__.get("forward")  # accelerate's hooks, where there are any
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
