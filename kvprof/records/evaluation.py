"""Evaluation: how far a plan's cache moves a model's predictions, and what it stores. Read, written, validated.

Made by `evaluate`, read by people. Every number is against the same model with its cache in full precision, on the same
text. Holds numbers only; lower KL is better.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from kvprof.records.document import Count, Document, ModelInfo, Number, Positive, Record, Text, is_absent
from kvprof.records.geometry import CacheGeometry, DType, check_same_model
from kvprof.records.scores import CalibrationInfo, MadeWith

Role = Literal["plan", "rival", "against"]
"""plan: what was asked about. rival: a published rule, at no more stored bits where it can be as cheap. against: a file
to compare with."""

Amount = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Perplexity = Annotated[Number, Field(ge=1 - 1e-6)]  # rounding aside, no text is more likely than certain

ROUNDING = 1e-6
"""Relative; what two ways of adding up the same numbers may differ by."""

GROUPING = 0.03
"""Relative; the bytes that a rival with larger groups, more of them waiting to be full, may have above a plan's. A
larger window costs more than that, and makes another size of cache."""


class PositionResult(Record):
    """One stretch of positions, over all sequences: the further back the cache reaches, the more of it is quantized."""

    first: Count
    """First position of the stretch, counted from 0."""
    last: Count
    tokens: Positive
    kl_nats: Amount
    top1_agreement: Share


class ContextBytes(Record):
    """What one sequence's cache takes at a context, its elements in full precision counted at 2 bytes each."""

    tokens: Positive
    bytes: Positive
    """Codes, scales, window, sinks and skipped layers."""
    bytes_at_16_bits: Positive
    """The same cache with nothing quantized."""
    compression: Amount
    """bytes_at_16_bits / bytes."""

    @model_validator(mode="after")
    def _is_the_ratio(self) -> Self:
        if not math.isclose(self.compression, self.bytes_at_16_bits / self.bytes, rel_tol=ROUNDING):
            raise ValueError(
                f"compression at {self.tokens} tokens is {self.compression}, "
                f"but {self.bytes_at_16_bits} / {self.bytes} is {self.bytes_at_16_bits / self.bytes:.6g}"
            )
        return self


class PlanResult(Record):
    """How one plan did."""

    name: Text
    role: Role
    digest: Text
    """sha256 of the plan's file."""
    nominal_bits: Amount
    stored_bits: Amount
    bytes_per_token: Amount
    """Bytes that one more token costs in the long run, of one sequence; 16 bits in the plan count as 2 bytes."""
    contexts: tuple[ContextBytes, ...]
    kl_nats: Amount
    """Mean over tokens of KL(full precision || planned)."""
    kl_stderr_nats: Amount | None = None
    """Its standard error over sequences; null where there was only one."""
    kl_p99_nats: Amount
    """What 99 % of the tokens stay below."""
    kl_excess_nats: Number = 0.0
    """This plan's mean KL less that of the evaluated plan; above 0 means that the evaluated one is better."""
    kl_excess_stderr_nats: Amount | None = None
    """Its standard error over sequences, each compared with itself; null where there was only one."""
    top1_agreement: Share
    """The share of tokens after which both find the same next token the likeliest."""
    perplexity: Perplexity
    by_position: tuple[PositionResult, ...]

    @model_validator(mode="after")
    def _positions_add_up(self) -> Self:
        if not self.by_position:
            raise ValueError(f"by_position of {self.name} is empty")
        reached = -1
        for part in self.by_position:
            if not reached < part.first <= part.last:
                raise ValueError(f"by_position of {self.name}: positions {part.first} to {part.last} are out of order")
            reached = part.last
        tokens = sum(part.tokens for part in self.by_position)
        for field in ("kl_nats", "top1_agreement"):
            mean = math.fsum(part.tokens * getattr(part, field) for part in self.by_position) / tokens
            if not math.isclose(mean, getattr(self, field), rel_tol=ROUNDING, abs_tol=1e-12):
                raise ValueError(
                    f"{field} of {self.name} is {getattr(self, field)}, but its positions add up to {mean:.6g}"
                )
        return self


class Evaluation(Document):
    """A file of results: the plan first, then what it is compared with."""

    kind: ClassVar[str] = "kvprof.evaluation/1"

    schema_: Literal["kvprof.evaluation/1"] = Field("kvprof.evaluation/1", alias="schema")
    kvprof_version: Text | None = None
    model: ModelInfo
    dtype: DType
    """What the model was run in."""
    text: CalibrationInfo
    path: Literal["fast", "exact"]
    """fast: one forward a sequence, in which every token attends to what a decoding step would read. exact: token by
    token through the packed cache."""
    measured_from: Count
    """The first position that counts."""
    reference_perplexity: Perplexity
    made_with: MadeWith | None = Field(None, exclude_if=is_absent)
    plans: tuple[PlanResult, ...]

    @model_validator(mode="after")
    def _one_plan_is_asked_about(self) -> Self:
        roles = [result.role for result in self.plans]
        if roles[:1] != ["plan"] or roles.count("plan") != 1:
            raise ValueError("plans must begin with the evaluated plan, and hold only one of role 'plan'")
        for name, times in Counter(result.name for result in self.plans).items():
            if times > 1:
                raise ValueError(f"the name {name} stands {times} times in plans; each needs one of its own")
        measured = {sum(part.tokens for part in result.by_position) for result in self.plans}
        if len(measured) > 1:
            raise ValueError("the plans were measured on different numbers of tokens, and cannot be compared")
        return self

    @property
    def plan(self) -> PlanResult:
        """The plan that was asked about."""
        return self.plans[0]

    @property
    def comparable(self) -> tuple[PlanResult, ...]:
        """The other plans that store no more than the evaluated one: bits an element, and bytes at a long context."""
        most_bits = self.plan.stored_bits * (1 + ROUNDING)
        most_bytes = self.plan.contexts[-1].bytes * (1 + GROUPING)
        return tuple(
            result
            for result in self.plans[1:]
            if result.stored_bits <= most_bits and result.contexts[-1].bytes <= most_bytes
        )

    @property
    def dearer(self) -> tuple[PlanResult, ...]:
        """The other plans, which store more than the evaluated one and prove nothing about it."""
        return tuple(result for result in self.plans[1:] if result not in self.comparable)

    @property
    def unbeaten(self) -> tuple[PlanResult, ...]:
        """The plans that store no more bits and have no higher mean KL."""
        return tuple(result for result in self.comparable if result.kl_nats <= self.plan.kl_nats)

    def check_fits(self, geometry: CacheGeometry, fingerprint: str | None = None) -> None:
        """Raise Mismatch, saying how they differ, when the evaluation is of another model than this one."""
        check_same_model("evaluation", self.model, None, geometry, fingerprint)
