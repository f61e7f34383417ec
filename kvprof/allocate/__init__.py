"""Arithmetic on records: from Scores and a budget to a BitPlan. No tensors.

`allocate` is what the command calls: it picks the rule by name, reads the limit and refuses options that do not go
together. It decides nothing about bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvprof.allocate.budget import Limit, bit_limit, memory_limit
from kvprof.allocate.rules import (
    KVMIX_FRACTION,
    USUAL_BITS,
    USUAL_GROUP_SIZE,
    USUAL_WINDOW,
    exact,
    kvmix,
    norm_greedy,
    uniform,
)
from kvprof.errors import UsageError, did_you_mean
from kvprof.records.plan import BitPlan, Window
from kvprof.records.scores import Scores

__all__ = ["RULES", "allocate"]

RULES = ("exact", "norm-greedy", "kvmix", "uniform")

_LIMIT_OPTIONS = ("--budget", "--unit", "--memory", "--context", "--batch")
_OPTIONS = {
    "exact": (*_LIMIT_OPTIONS, "--metric", "--bits"),
    "norm-greedy": (*_LIMIT_OPTIONS, "--metric", "--bits"),
    "kvmix": ("--top-fraction",),
    "uniform": ("--bits-key", "--bits-value", "--metric"),
}
"""The options that each rule obeys, besides those that all of them do."""


def allocate(
    scores: Scores,
    *,
    rule: str = "exact",
    budget: str | float | None = None,
    unit: str | None = None,
    memory: str | None = None,
    context: int | None = None,
    batch: int | None = None,
    metric: str | None = None,
    bits: Sequence[int] | None = None,
    top_fraction: str | float | None = None,
    bits_key: int | None = None,
    bits_value: int | None = None,
    group_size: int = USUAL_GROUP_SIZE,
    pins: Sequence[str] = (),
    window: Window = USUAL_WINDOW,
    command: str | None = None,
) -> BitPlan:
    """Return the plan of a rule, named as in RULES.

    budget, unit: bits per element, "nominal" (the default) or "stored". memory, context, batch: bytes of cache, such
    as "1.5GiB", for `batch` (default 1) sequences of `context` tokens. metric, bits: for `exact` and `norm-greedy`;
    by default the scores' first metric and USUAL_BITS. top_fraction: for `kvmix`. bits_key, bits_value: for
    `uniform`. pins: see pins.py. command: for the plan's provenance.
    Raises UsageError for an unknown rule, an option that the rule would ignore or lacks, or options that contradict
    each other; and whatever the rule raises.
    """
    if rule not in RULES:
        raise UsageError(f"unknown rule {rule!r}: {did_you_mean(rule, RULES)}")
    options = {
        "--budget": budget,
        "--unit": unit,
        "--memory": memory,
        "--context": context,
        "--batch": batch,
        "--metric": metric,
        "--bits": bits,
        "--top-fraction": top_fraction,
        "--bits-key": bits_key,
        "--bits-value": bits_value,
    }
    for option, value in options.items():
        if value is not None and option not in _OPTIONS[rule]:
            takes = ", ".join(_OPTIONS[rule])
            raise UsageError(f"--rule {rule} takes no {option}; it would change nothing.\n  {rule} takes {takes}.")
    if rule == "kvmix":
        fraction = KVMIX_FRACTION if top_fraction is None else top_fraction
        return kvmix(scores, top_fraction=fraction, group_size=group_size, pins=pins, window=window, command=command)
    if rule == "uniform":
        if bits_key is None or bits_value is None:
            raise UsageError("--rule uniform needs the bits of both.\n  Give --bits-key 4 --bits-value 2.")
        return uniform(
            scores,
            bits_key,
            bits_value,
            metric=metric,
            group_size=group_size,
            pins=pins,
            window=window,
            command=command,
        )
    return (exact if rule == "exact" else norm_greedy)(
        scores,
        _limit(rule, budget, unit, memory, context, batch),
        metric=metric,
        bits=USUAL_BITS if bits is None else bits,
        group_size=group_size,
        pins=pins,
        window=window,
        command=command,
    )


def _limit(
    rule: str,
    budget: str | float | None,
    unit: str | None,
    memory: str | None,
    context: int | None,
    batch: int | None,
) -> Limit:
    """Return the one limit that the options give."""
    if budget is not None and memory is not None:
        raise UsageError("--budget and --memory are two limits; give one of them.")
    if budget is not None:
        if context is not None or batch is not None:
            raise UsageError("--context and --batch belong to --memory; a budget in bits does not depend on them.")
        return bit_limit(budget, unit)
    if memory is not None:
        if unit is not None:
            raise UsageError("--unit belongs to --budget; --memory counts bytes.")
        if context is None:
            raise UsageError("--memory needs to know how many tokens to hold.\n  Add --context 32768.")
        return memory_limit(memory, context, 1 if batch is None else batch)
    raise UsageError(f"--rule {rule} needs a limit.\n  Give --budget 2.5, or --memory 1.5GiB --context 32768.")
