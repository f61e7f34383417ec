"""Spectra: the singular values of each layer's cached keys and values, on calibration text. Read, written, validated.

Made by `spectra`, read by people and by pictures. Holds numbers only, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from kvprof.records.document import Document, LayerIndex, ModelInfo, Number, Positive, Record, Text, is_absent
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry, check_same_model
from kvprof.records.plan import head_dim_of
from kvprof.records.scores import CalibrationInfo, MadeWith

Amount = Annotated[Number, Field(ge=0)]

ROUNDING = 1e-6
"""Relative; what two ways of adding up the same numbers may differ by."""


class Spectrum(Record):
    """The singular values of one layer's keys, or of its values: of the (T, D) matrix of each KV head.

    A head's own values are means over the sequences that were read, index by index. A sequence of fewer tokens than
    the head has dimensions has zeros for those that it lacks.
    """

    heads: Positive
    mean: tuple[Amount, ...]
    """Over heads; the largest first."""
    low: tuple[Amount, ...]
    """The least of any head, at each index."""
    high: tuple[Amount, ...]
    """The largest of any head, at each index."""
    spectral_norm: Amount
    """The largest singular value: mean over heads and sequences."""
    frobenius_norm: Amount
    """The root of the sum of squares: mean over heads and sequences."""

    @model_validator(mode="after")
    def _is_a_band(self) -> Self:
        if not self.mean:
            raise ValueError("mean is empty; a matrix has at least one singular value")
        for name in ("low", "high"):
            if len(getattr(self, name)) != len(self.mean):
                raise ValueError(f"{name} has {len(getattr(self, name))} singular values, mean has {len(self.mean)}")
        for name in ("mean", "low", "high"):
            values: Sequence[float] = getattr(self, name)
            for index, (before, after) in enumerate(pairwise(values), start=1):
                if after > before * (1 + ROUNDING):
                    raise ValueError(f"{name}[{index}] is {after}, more than the {before} before it; they must descend")
        slack = ROUNDING * max(self.high)
        for index, (low, mean, high) in enumerate(zip(self.low, self.mean, self.high, strict=True)):
            if not low - slack <= mean <= high + slack:
                raise ValueError(f"mean[{index}] is {mean}, outside of low and high, {low} and {high}")
        return self

    @model_validator(mode="after")
    def _norms_are_of_these_values(self) -> Self:
        if not math.isclose(self.spectral_norm, self.mean[0], rel_tol=ROUNDING):
            raise ValueError(f"spectral_norm is {self.spectral_norm}, but the largest mean is {self.mean[0]}")
        least = math.hypot(*self.mean)  # a mean of norms is no less than the norm of the mean
        if self.frobenius_norm < least * (1 - ROUNDING):
            raise ValueError(f"frobenius_norm is {self.frobenius_norm}, but the means alone make {least}")
        return self

    def values_for(self, share: float) -> int:
        """Return how many of the largest mean values hold this share of their energy, the sum of squares; 0 of none."""
        energies = [value * value for value in self.mean]
        needed, found = share * math.fsum(energies), 0.0
        for count, energy in enumerate(energies):
            if found >= needed:
                return count
            found += energy
        return len(energies)


class LayerSpectra(Record):
    """Both tensors of one layer."""

    layer: LayerIndex
    key: Spectrum
    value: Spectrum

    def tensor(self, name: TensorName) -> Spectrum:
        """Return the key's or the value's spectrum."""
        return self.key if name == "key" else self.value


class Spectra(Document):
    """A file of spectra: one entry for each layer that has K and V projections of its own, ascending by layer."""

    kind: ClassVar[str] = "kvprof.spectra/1"

    schema_: Literal["kvprof.spectra/1"] = Field("kvprof.spectra/1", alias="schema")
    kvprof_version: Text | None = None
    model: ModelInfo | None = None
    calibration: CalibrationInfo | None = None
    """The text that was read."""
    geometry: CacheGeometry | None = None
    made_with: MadeWith | None = Field(None, exclude_if=is_absent)
    layers: tuple[LayerSpectra, ...]

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        if not self.layers:
            raise ValueError("layers is empty; a file of spectra has at least one layer")
        for before, after in pairwise(entry.layer for entry in self.layers):
            if not before < after:
                raise ValueError(f"layers must ascend, each once: {after} follows {before}")
        if self.model is not None and self.layers[-1].layer >= self.model.num_layers:
            raise ValueError(f"there is no layer {self.layers[-1].layer}: model.num_layers is {self.model.num_layers}")
        return self

    @model_validator(mode="after")
    def _layers_are_the_geometrys(self) -> Self:
        if self.geometry is None:
            return self
        if self.model is not None and self.geometry.num_layers != self.model.num_layers:
            raise ValueError(
                f"model.num_layers is {self.model.num_layers}, but the geometry has {self.geometry.num_layers} layers"
            )
        expected, found = {shape.layer: shape for shape in self.geometry.scored}, {entry.layer for entry in self.layers}
        for missing in sorted(set(expected) - found):
            raise ValueError(f"layer {missing} is missing; measure again")
        for surplus in sorted(found - set(expected)):
            raise ValueError(f"layer {surplus} has no K and V projections in this model; remove its entry")
        for entry in self.layers:
            shape = expected[entry.layer]
            for tensor in TENSORS:
                spectrum = entry.tensor(tensor)
                dims = head_dim_of(shape, tensor)
                if spectrum.heads != shape.kv_heads or len(spectrum.mean) > dims:
                    raise ValueError(
                        f"layer {entry.layer}: the {tensor} has {len(spectrum.mean)} singular values of "
                        f"{spectrum.heads} heads, but the geometry {shape.kv_heads} heads of {dims}"
                    )
        return self

    def check_fits(self, geometry: CacheGeometry, fingerprint: str | None = None) -> None:
        """Raise Mismatch, saying how they differ, when the spectra are of another model than this one."""
        check_same_model("spectra", self.model, self.geometry, geometry, fingerprint)

    @property
    def larger_keys(self) -> tuple[int, ...]:
        """The layers whose keys have the larger spectral norm."""
        return tuple(entry.layer for entry in self.layers if entry.key.spectral_norm > entry.value.spectral_norm)
