"""What `kvprof diff` finds: which tensors two plans of one model store differently, and what that changes.

Plain data made by `analysis.diff` and printed by `report`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import computed_field

from kvprof.records.document import Count, LayerIndex, Number, Positive, Record, Text
from kvprof.records.formats import TensorWord
from kvprof.records.plan import TensorPlan

Direction = Literal["up", "down", "level"]
"""up: more stored bits than before. level: another format of the same stored bits."""


class TensorChange(Record):
    """One tensor that the second plan stores differently from the first."""

    layer: LayerIndex
    tensor: TensorWord
    before: TensorPlan
    after: TensorPlan
    stored_bits_before: Number
    stored_bits_after: Number
    predicted_change_nats: Number | None = None
    """What the change alone does to the predicted KL; null where no scores were given, or they lack a format."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def direction(self) -> Direction:
        """Where the stored bits went; a share of the recent past in full precision counts where they stayed."""
        before = (self.stored_bits_before, self.before.recent_fraction)
        after = (self.stored_bits_after, self.after.recent_fraction)
        return "level" if before == after else "up" if before < after else "down"


class SettingChange(Record):
    """A field beside the layers that differs: `window.sink_tokens`, `quantizer.rotation_seed`."""

    name: Text
    before: int | str
    after: int | str


class PlanCosts(Record):
    """What one of the two plans costs, counted again from its layers."""

    name: Text
    nominal_bits: Number
    stored_bits: Number
    bytes_per_token: Number | None = None
    """Of one sequence, in the long run; null where neither plan carries a geometry, as are the bytes below."""
    bytes_at: dict[int, Count] | None = None
    """Bytes of the cache of one sequence, window and skipped layers counted, by its tokens of context."""
    predicted_kl_nats: Number | None = None
    """From the scores where they were given, else as the plan's file has it."""
    predicted_kl_stderr_nats: Number | None = None


class Comparison(Record):
    """Two plans of one model, the second against the first."""

    first: PlanCosts
    second: PlanCosts
    tensors: Positive
    """Tensors that each plan gives bits to: keys and values, or the parts of latents."""
    changes: tuple[TensorChange, ...]
    settings: tuple[SettingChange, ...]
    predicted_change_nats: Number | None = None
    """The second plan's predicted KL less the first's."""
    predicted_change_stderr_nats: Number | None = None
    """Its standard error over sequences, each compared with itself; null where the scores have no samples."""
    remarks: tuple[Text, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def same(self) -> bool:
        """Whether both plans store the same."""
        return not self.changes and not self.settings
