"""What `kvprof inspect` finds: a model's cache geometry, and red flags about it, each with why it matters.

Plain data made by `models.inventory` and printed by `report`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from pydantic import Field, computed_field

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
    dtype_assumed: bool = False
    """Whether the geometry's dtype is a guess: the config names none, and there are no weights to ask."""
    sizes_by_default: dict[Text, Count] = Field({}, exclude_if=operator.not_)
    """Sizes that the config does not name, as transformers takes them then."""
    key_norm_offset: Number | None = None
    """What the norm after k_proj adds to its stored gains (1 in Gemma); null where there is no such norm."""

    def with_defaults(self, sizes: Mapping[str, int]) -> Inventory:
        """Return the inventory of a config that leaves these sizes to transformers."""
        return self.model_copy(update={"sizes_by_default": dict(sizes)})

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bytes_per_token(self) -> int | None:
        """Bytes that each token adds for good, to the layers whose cache grows; null where a cache is not known."""
        if self.geometry.unknown:
            return None
        return sum(map(self.geometry.bytes_per_token, self.geometry.growing))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bytes_at(self) -> dict[int, int] | None:
        """Bytes of the unquantized cache of one sequence, by its tokens of context; null where a cache is not known."""
        if self.geometry.unknown:
            return None
        return {tokens: self.geometry.bytes_at(tokens) for tokens in self.geometry.contexts}
