"""Audit: how well scores predict what was measured, of single tensors and of whole plans. Read, written, validated.

Made by `audit`, read by people and by the picture. Holds numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kvprof.records.document import Count, Document, LayerIndex, ModelInfo, Number, Positive, Record, Text
from kvprof.records.formats import TensorName
from kvprof.records.geometry import CacheGeometry, check_same_model
from kvprof.records.plan import BitPlan
from kvprof.records.scores import CalibrationInfo, DecodingSetup, KlCalibration

Amount = Annotated[Number, Field(ge=0)]
Ratio = Annotated[Number, Field(gt=0)]
Rank = Annotated[Number, Field(ge=-1 - 1e-9, le=1 + 1e-9)]


class AuditPoint(Record):
    """One tensor of one layer in one format: what was measured, and what each metric says."""

    layer: LayerIndex
    tensor: TensorName
    format: Text
    bits: Positive
    """Of the codes."""
    measured_nats: Amount
    """KL divergence from full precision, a token."""
    measured_stderr_nats: Amount | None = None
    scores: dict[Text, Amount]
    """A metric's label to its number; `loss_increase` in nats a token, the others in units of their own."""


class Agreement(Record):
    """One metric against the measurement, over one group of tensors."""

    label: Text
    """Of the metric, as the points have it."""
    group: Text
    """Which measurements: `2 bits` (all of that width), `keys int2g64`."""
    bits: Positive
    tensors: Positive
    spearman: Rank | None = None
    """Rank correlation with what was measured; null for less than three tensors, or a metric that is constant."""


class RatioSpread(Record):
    """Predicted over measured loss, over one group of tensors."""

    label: Text
    group: Text
    bits: Positive
    tensors: Positive
    """Those whose ratio is a number: both losses above zero."""
    median: Ratio
    low: Ratio
    """What 10 % of the ratios stay below."""
    high: Ratio
    """What 90 % stay below."""
    worst: Ratio
    """The one furthest from 1, by its logarithm."""
    worst_layer: LayerIndex
    worst_tensor: TensorName


class PlanCheck(Record):
    """A whole plan: its predicted and its measured KL divergence, in nats a token."""

    name: Text
    digest: Text
    stored_bits: Amount
    predicted_kl_nats: Amount
    measured_kl_nats: Amount
    measured_kl_stderr_nats: Amount | None = None
    text: Text | None = None
    """What it was measured on."""
    measured_from: Count | None = None
    """The first position that counted; null where a share of each sequence did."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where either is zero."""
        if not self.predicted_kl_nats or not self.measured_kl_nats:
            return None
        return self.measured_kl_nats / self.predicted_kl_nats


@dataclass(frozen=True)
class PredictedPlan:
    """A plan and what scores say of it, no factor in it."""

    name: str
    plan: BitPlan
    stored_bits: float
    predicted_nats: float
    """A token."""
    samples: tuple[float, ...] | None = None
    """Each calibration sequence's own, where known."""


class Audit(Document):
    """A file of comparisons."""

    kind: ClassVar[str] = "kvprof.audit/1"

    schema_: Literal["kvprof.audit/1"] = Field("kvprof.audit/1", alias="schema")
    kvprof_version: Text | None = None
    model: ModelInfo | None = None
    text: CalibrationInfo | None = None
    """What the divergence was measured on."""
    decoding: DecodingSetup | None = None
    kl_calibration: KlCalibration | None = None
    """Of the scores that the plans' predictions come from."""
    points: tuple[AuditPoint, ...]
    agreements: tuple[Agreement, ...]
    ratios: tuple[RatioSpread, ...]
    plans: tuple[PlanCheck, ...]
    remarks: tuple[Text, ...] = ()

    def check_fits(self, geometry: CacheGeometry, fingerprint: str | None = None) -> None:
        """Raise Mismatch, saying how they differ, when the audit is of another model than this one."""
        check_same_model("audit", self.model, None, geometry, fingerprint)
