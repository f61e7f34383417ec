"""Frontier: the best plan at every budget: what it stores, and what it is predicted to lose. Read, written, validated.

Made by `frontier`, read by people and by the picture. Holds numbers and the plans' names, not the plans.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from kvprof.records.document import Document, ModelInfo, Number, Positive, Record, Text
from kvprof.records.geometry import CacheGeometry, check_same_model
from kvprof.records.plan import Window
from kvprof.records.scores import KlCalibration

Amount = Annotated[Number, Field(ge=0)]
Bits = Annotated[Number, Field(gt=0)]

ROUNDING = 1e-6
"""Relative; what two ways of writing the same number may differ by."""


class FrontierPoint(Record):
    """The plan that `kvprof allocate` makes at one budget."""

    budget: Bits
    """Bits an element, in the frontier's unit: what --budget says."""
    nominal_bits: Bits
    stored_bits: Bits
    """Nominal bits and the scales, an element."""
    bytes_per_token: Amount | None = None
    """Bytes that one more token costs in the long run, of one sequence; null where the geometry is unknown."""
    bytes: Positive | None = None
    """Of the whole cache, window and all, at the frontier's context and batch; null where none was asked for."""
    compression: Amount
    """16 / stored_bits: how many times smaller than 16 bits an element, in the long run."""
    predicted_kl_nats: Amount
    """Nats a token."""
    predicted_kl_stderr_nats: Amount | None = None
    """Its standard error over the calibration sequences."""
    plan_digest: Text
    """`BitPlan.recipe` of the plan: equal where two budgets have the same one."""
    optimal: bool
    """Whether no plan within the budget is predicted to lose less: proven."""
    knee: bool
    """Whether the curve bends here: fewer bits lose far more, more bits save little."""

    @model_validator(mode="after")
    def _is_the_ratio(self) -> Self:
        if not math.isclose(self.compression, 16 / self.stored_bits, rel_tol=ROUNDING):
            raise ValueError(
                f"compression at a budget of {self.budget} is {self.compression}, but 16 / {self.stored_bits} "
                f"is {16 / self.stored_bits:.6g}"
            )
        return self


class Frontier(Document):
    """A file of plans' costs and predicted losses, by ascending budget."""

    kind: ClassVar[str] = "kvprof.frontier/1"

    schema_: Literal["kvprof.frontier/1"] = Field("kvprof.frontier/1", alias="schema")
    kvprof_version: Text | None = None
    model: ModelInfo | None = None
    scores: Text | None = None
    """sha256 of the Scores that all plans are made from."""
    command: Text | None = None
    metric: Text
    unit: Literal["nominal", "stored"]
    """What the budgets count."""
    window: Window
    context: Positive | None = None
    """Tokens a sequence, and sequences, that `bytes` are counted at."""
    batch: Positive | None = None
    kl_calibration: KlCalibration | None = None
    """What the predicted KL is multiplied by; null where the scores were not calibrated."""
    points: tuple[FrontierPoint, ...]

    @model_validator(mode="after")
    def _budgets_ascend_and_are_kept(self) -> Self:
        if not self.points:
            raise ValueError("points is empty; a frontier has at least one budget")
        for before, after in pairwise(self.points):
            if not before.budget < after.budget:
                raise ValueError(f"budgets must ascend, each once: {after.budget} follows {before.budget}")
        for point in self.points:
            spent = point.stored_bits if self.unit == "stored" else point.nominal_bits
            if spent > point.budget:
                raise ValueError(f"the plan at a budget of {point.budget} {self.unit} bits has {spent}")
            if (point.bytes is None) != (self.context is None):
                raise ValueError("bytes and context stand together, or neither does")
        return self

    def check_fits(self, geometry: CacheGeometry, fingerprint: str | None = None) -> None:
        """Raise Mismatch, saying how they differ, when the frontier is of another model than this one."""
        check_same_model("frontier", self.model, None, geometry, fingerprint)

    @property
    def knees(self) -> tuple[FrontierPoint, ...]:
        """The budgets at which the curve bends."""
        return tuple(point for point in self.points if point.knee)
