"""What `kvprof explain` finds: what some tensors cost at each format, against the price of a bit in the whole plan.

Plain data made by `analysis.explain` and printed by `report`. A loss is in nats a token where the metric is
`loss_increase`, else in units of the metric's own; `price` always says what one stored bit an element is worth.
"""

from __future__ import annotations

from typing import Literal

from kvprof.records.document import LayerIndex, Number, Record, Text
from kvprof.records.formats import TensorWord

Verdict = Literal["stays", "would move", "dominated", "unknown"]
"""stays: no other format is better at the shadow price. would move: another one is. dominated: another one stores no
more bits and loses no more. unknown: the loss of its format, or the shadow price, is not known."""


class Offer(Record):
    """One format that a tensor could have."""

    format: Text
    stored_bits: Number
    """Of an element of this tensor."""
    loss: Number
    stderr: Number | None = None
    """Its standard error over sequences."""
    chosen: bool
    on_hull: bool
    """Whether some price of a bit makes it the best: a corner of the lower convex hull of loss over bits."""
    loss_per_bit: Number | None = None
    """Loss a stored bit, between this format and the chosen one: what going up saves, or going down costs, a bit."""
    balanced_change: Number | None = None
    """What the move would change of the plan's loss, the bits taken from or given to all others at the shadow price."""


class Move(Record):
    """The next corner of a tensor's convex hull, up or down from the chosen format."""

    format: Text
    plan_stored_bits: Number
    """Of an element, averaged over the cache, if this tensor alone moved."""
    plan_loss: Number | None = None
    loss_change: Number
    loss_change_stderr: Number | None = None
    """Its standard error over sequences, each compared with itself."""
    loss_per_bit: Number
    """What going up saves, or going down costs, a stored bit an element of this tensor."""
    balanced_change: Number | None = None


class TensorExplanation(Record):
    """Why one tensor has the format that it has."""

    layer: LayerIndex
    tensor: TensorWord
    chosen: Text
    stored_bits: Number
    loss: Number | None = None
    """Null where the chosen format was not scored."""
    width_share: Number
    """Of the cached elements of all tensors that the plan gives bits to."""
    price: Number | None = None
    """What the memory of one stored bit an element of this tensor is worth anywhere: the shadow price, its share."""
    offers: tuple[Offer, ...]
    up: Move | None = None
    down: Move | None = None
    verdict: Verdict
    prefers: Text | None = None
    """The format that is best at the shadow price, or that dominates; null where that is the chosen one."""
    gain: Number | None = None
    """What having it instead would take off the plan's loss, with the budget balanced at the shadow price."""


class Explanation(Record):
    """A plan's price of a bit, and some of its tensors against it."""

    plan: Text
    scores: Text
    metric: Text
    unit: Text
    """Of every loss."""
    method: Text | None = None
    optimal: bool
    """Whether the plan says that nothing within its budget and formats loses less by this metric."""
    stored_bits: Number
    """Of an element, averaged over the cache."""
    loss: Number | None = None
    """What its tensors lose, each alone, in sum; null where a format was not scored."""
    shadow_price: Number | None = None
    """What one more stored bit an element, averaged over the cache, saves where it saves the most; null where the plan
    stores less than any plan of the scored formats."""
    factor: Number
    """Measured over predicted KL, as calibrated; it is in every loss."""
    tensors: tuple[TensorExplanation, ...]
    remarks: tuple[Text, ...] = ()
