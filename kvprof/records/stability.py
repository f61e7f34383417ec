"""How much of a plan is chance: what other calibration sequences of the same text would have changed.

Plain data made by `analysis.stability` and printed by `report`.
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
    regret_p90: Amount
    """How much more a resample's plan loses than theirs does, by all sequences, as a share of it: what 90 % of the
    resamples stay within."""
