"""One sequence, one plan -> the logits of every position, as a decoding model with that cache would find them.

Two ways to the same numbers. fast: one forward, in which the attention of every token is replaced by what a decoding
step there would read. exact: token by token through the packed cache itself. Does not know text, nor what the logits
are compared with.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.errors import UnsupportedAttention, first_line
from kvprof.models.decoder import cache_argument
from kvprof.models.load import input_device
from kvprof.models.memory import memory_explained
from kvprof.records.plan import BitPlan
from kvprof.runtime.attention.reference import decoding_reads
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


def reference_logits(model: PreTrainedModel, ids: Sequence[int], first: int = 0) -> Tensor:
    """Return the logits after each token from position `first` on, everything in full precision: (T - first, V)."""
    with torch.no_grad(), _memory_explained(model, len(ids)):
        return _forward(model, ids, first)


def planned_logits(model: PreTrainedModel, plan: BitPlan, ids: Sequence[int], route: Route, first: int = 0) -> Tensor:
    """Return the same where every token read the cache that the plan would have left it.

    plan: known to be this model's; of its fit, only shapes are looked at.
    """
    with torch.no_grad(), _memory_explained(model, len(ids)):
        if route == "fast":
            with decoding_reads(model, plan):
                return _forward(model, ids, first)
        # With a fingerprint to compare, every cache would hash all of W_k and W_v.
        unstamped = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": None})})
        cache = PlanCache.from_plan(unstamped, model)
        name, steps = cache_argument(model), []
        for position, token in enumerate(ids):
            output = model(input_ids=_tensor(model, [token]), use_cache=True, **{name: cache})
            if position >= first:
                steps.append(output.logits[0, -1])
        return torch.stack(steps)


def _forward(model: PreTrainedModel, ids: Sequence[int], first: int) -> Tensor:
    kept = len(ids) - first
    options = {}
    # Nothing here is as large as the logits: those that nobody asks for are better never made.
    if first > 0 and "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = kept
    logits: Tensor = model(input_ids=_tensor(model, ids), use_cache=False, **options).logits[0, -kept:]
    return logits


def _tensor(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=input_device(model))


def _memory_explained(model: PreTrainedModel, tokens: int) -> AbstractContextManager[None]:
    return memory_explained(
        f"out of memory on {input_device(model)} with a sequence of {tokens} tokens.\n"
        "  Lower --sequence-length, or try --dtype bfloat16; what is measured so far is kept."
    )
