"""What `kvprof inspect` finds: a model's cache geometry, and red flags about it, each with why it matters.

Plain data made by `models.inventory` and printed by `report`.
"""

from __future__ import annotations

from kvprof.records.document import Count, ModelInfo, Number, Record, Text
from kvprof.records.geometry import CacheGeometry


class RedFlag(Record):
    """Something in a model's attention that changes what its cache needs, or what a score of it means."""

    name: Text
    layers: tuple[Count, ...]
    why: Text


class Inventory(Record):
    """The cache of one model, known from its config alone."""

    model: ModelInfo
    geometry: CacheGeometry
    red_flags: tuple[RedFlag, ...]
    key_norm_offset: Number | None = None
    """What the norm after k_proj adds to its stored gains (1 in Gemma); null where there is no such norm."""

    def has_flag(self, name: str) -> bool:
        """Whether a red flag of this name was raised."""
        return any(flag.name == name for flag in self.red_flags)
