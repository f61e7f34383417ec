"""Per-token numbers of every sequence -> one plan's line in the record: means, errors, stretches of positions, bytes.

Reads plain numbers and a plan; knows no tensors, no model and no text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvprof.errors import KvprofError
from kvprof.records.costs import context_bytes, costs
from kvprof.records.evaluation import PlanResult, PositionResult, Role
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan

FIRST_STRETCH = 16
"""Positions 0 to 15 are one stretch; each further one is as long as all before it."""

LONG_CONTEXT = 32_768
"""Tokens that the size of a cache is told at, besides those that were evaluated; fewer, where the model was made for
fewer."""

LARGEST_NLL = 700.0
"""Nats a token; e to more than this is no number. Taking every token for equally likely costs about 11."""


@dataclass(frozen=True)
class SequenceResult:
    """What was measured of one plan on one sequence, from the first position that counts.

    kl_nats, agrees: one number a token. nll_nats: of the tokens that have a target, all but the last.
    """

    kl_nats: tuple[float, ...]
    agrees: tuple[int, ...]
    nll_nats: float

    @property
    def targets(self) -> int:
        """Tokens whose successor is known."""
        return len(self.kl_nats) - 1


def summarise(
    name: str,
    role: Role,
    plan: BitPlan,
    geometry: CacheGeometry,
    sequences: Sequence[SequenceResult],
    evaluated: Sequence[SequenceResult],
    measured_from: int,
) -> PlanResult:
    """Return a plan's results over all sequences.

    geometry: the model's; a plan written by hand has none. evaluated: the results, on the same sequences, of the plan
    that was asked about.
    """
    counts = [len(sequence.kl_nats) for sequence in sequences]
    totals = [math.fsum(sequence.kl_nats) for sequence in sequences]
    excess = [total - math.fsum(other.kl_nats) for total, other in zip(totals, evaluated, strict=True)]
    nominal_bits, stored_bits, bytes_per_token = costs(plan, geometry)
    longest = measured_from + max(counts)
    long = min(LONG_CONTEXT, geometry.positions or LONG_CONTEXT)
    return PlanResult(
        name=name,
        role=role,
        digest=plan.digest,
        nominal_bits=nominal_bits,
        stored_bits=stored_bits,
        bytes_per_token=bytes_per_token,
        contexts=tuple(context_bytes(plan, geometry, tokens) for tokens in dict.fromkeys((longest, long))),
        kl_nats=math.fsum(totals) / sum(counts),
        kl_stderr_nats=_stderr(totals, counts),
        kl_p99_nats=float(np.quantile([kl for sequence in sequences for kl in sequence.kl_nats], 0.99)),
        kl_excess_nats=math.fsum(excess) / sum(counts),
        kl_excess_stderr_nats=_stderr(excess, counts),
        top1_agreement=sum(sum(sequence.agrees) for sequence in sequences) / sum(counts),
        perplexity=perplexity([s.nll_nats for s in sequences], [s.targets for s in sequences]),
        by_position=_by_position(sequences, measured_from),
    )


def perplexity(nll_nats: Sequence[float], targets: Sequence[int]) -> float:
    """Return e to the mean negative log likelihood of a target, from each sequence's sum and number of targets."""
    mean = math.fsum(nll_nats) / sum(targets)
    if mean > LARGEST_NLL:
        raise KvprofError(f"the text is {mean:.6g} nats a token unlikely: the model's weights are damaged.")
    return math.exp(mean)


def _stderr(totals: Sequence[float], counts: Sequence[int]) -> float | None:
    """Return the standard error over sequences of sum(totals) / sum(counts), a ratio; None for a single sequence.

    Of sequences of equal length it is the standard deviation of their means over the root of their number.
    """
    number = len(totals)
    if number < 2:
        return None
    mean = math.fsum(totals) / sum(counts)
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return math.sqrt(number / (number - 1) * squares) / sum(counts)


def _by_position(sequences: Sequence[SequenceResult], measured_from: int) -> tuple[PositionResult, ...]:
    longest = measured_from + max(len(sequence.kl_nats) for sequence in sequences)
    parts = []
    first, end = 0, FIRST_STRETCH
    while first < longest:
        here = slice(max(0, first - measured_from), max(0, end - measured_from))
        kl = [number for sequence in sequences for number in sequence.kl_nats[here]]
        agrees = [number for sequence in sequences for number in sequence.agrees[here]]
        if kl:
            parts.append(
                PositionResult(
                    first=max(first, measured_from),
                    last=min(end, longest) - 1,
                    tokens=len(kl),
                    kl_nats=math.fsum(kl) / len(kl),
                    top1_agreement=sum(agrees) / len(agrees),
                )
            )
        first, end = end, 2 * end
    return tuple(parts)
