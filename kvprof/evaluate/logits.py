"""One sequence, one plan -> the logits of every position, as a decoding model with that cache would find them.

Two ways to the same numbers. fast: one forward, in which the attention of every token is replaced by what a decoding
step there would read. exact: token by token through the packed cache itself. Does not know text, nor what the logits
are compared with.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.errors import KvprofError, UnsupportedAttention, first_line
from kvprof.records.plan import BitPlan
from kvprof.runtime.attention import decoding_reads
from kvprof.runtime.cache import PlanCache

logger = logging.getLogger(__name__)

Route = Literal["fast", "exact"]


def choose_route(model: PreTrainedModel, plan: BitPlan, ids: Sequence[int], exact: bool) -> Route:
    """Return `exact` where it is asked for, or where the model's attention cannot be replaced; then says so.

    ids: a few tokens. Some models show only while they run that they attend in a way of their own.
    """
    if exact:
        return "exact"
    try:
        planned_logits(model, plan, ids, "fast")
        return "fast"
    except UnsupportedAttention as error:
        logger.info("%s\nMeasuring token by token through the cache instead, which is slower.", first_line(error))
        return "exact"


def reference_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return the logits after each token with everything in full precision, (T, V)."""
    with torch.no_grad(), _memory_explained(model, len(ids)):
        return _forward(model, ids)


def planned_logits(model: PreTrainedModel, plan: BitPlan, ids: Sequence[int], route: Route) -> Tensor:
    """Return the logits after each token where every token read the cache that the plan would have left it, (T, V)."""
    with torch.no_grad(), _memory_explained(model, len(ids)):
        if route == "fast":
            with decoding_reads(model, plan):
                return _forward(model, ids)
        cache = PlanCache.from_plan(plan, model)
        steps = []
        for token in ids:
            output = model(input_ids=_tensor(model, [token]), past_key_values=cache, use_cache=True)
            steps.append(output.logits[0, -1])
        return torch.stack(steps)


def _forward(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(input_ids=_tensor(model, ids), use_cache=False).logits[0]
    return logits


def _tensor(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: accelerate moves what comes in to where it computes
        device = torch.device("cpu")
    return torch.tensor([list(ids)], device=device)


@contextlib.contextmanager
def _memory_explained(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise KvprofError(
            f"out of memory on {model.device} with a sequence of {tokens} tokens.\n"
            "  Lower --sequence-length, or try --dtype bfloat16; what is measured so far is kept."
        ) from None
