"""How much of a plan is chance: what other calibration sequences of the same text would have changed.

Plain data made by `allocate.stability` and printed by `report`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kvprof.records.document import Number, Positive, Record

Amount = Annotated[Number, Field(ge=0)]


class Stability(Record):
    """A plan against those that resampled calibration sequences make at the same stored bits."""

    resamples: Positive
    sequences: Positive
    """That the scores were measured on."""
    tensors: Positive
    """Keys and values that the plan gives bits to."""
    changed_mean: Amount
    """Tensors that a resample gives another format, on average."""
    changed_p90: Amount
    """What 90 % of the resamples stay within."""
    kl_nats: Amount
    """The plan's predicted KL."""
    kl_p5_nats: Amount
    """What it is on resamples: 5 % of them predict less than this,"""
    kl_p95_nats: Amount
    """and 5 % more than this."""
    regret_mean: Amount
    """What the plan loses by being made from so few sequences, as a share of its predicted KL: the mean over resamples
    of how much more the resample's plan loses, by all sequences, than theirs does."""
    regret_p90: Amount
    """What 90 % of the resamples stay within."""
