"""The numbers that a picture or a page shows, taken out of records: by layer, by format, by plan.

Plain functions of records, the same for every picture and page. Does not know how anything is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from kvprof.errors import UsageError
from kvprof.records.evaluation import Evaluation, PlanResult
from kvprof.records.formats import TensorName, format_named
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, head_dim_of, stored_like
from kvprof.records.scores import Scores
from kvprof.records.spectra import Spectra

T = TypeVar("T")

SPECTRUM_FLOOR = 1e-6
"""Of the largest singular value: what lies below is rounding, and off every picture."""


class LayerNumber(NamedTuple):
    """One metric of one layer's keys or values."""

    layer: int
    value: float
    stderr: float | None = None
    """Over calibration sequences; None where it is not known."""


def by_layer(scores: Scores, metric: str, tensor: TensorName) -> list[LayerNumber]:
    """Return a metric that is one number a tensor, of every layer that has it, ascending by layer."""
    found = []
    for entry in scores.layers:
        own = entry.tensor(tensor)
        value = getattr(own, metric)
        if value is not None:
            found.append(LayerNumber(entry.layer, value, getattr(own, f"{metric}_stderr", None)))
    return found


class LossTable(NamedTuple):
    """The predicted loss of all keys, or of all values, in every format: a row a format, a column a layer."""

    layers: tuple[int, ...]
    formats: tuple[str, ...]
    """By ascending stored bits; those that no cache can store come last."""
    stored_bits: tuple[float | None, ...]
    """Of each format, an element."""
    nats: tuple[tuple[float | None, ...], ...]
    """(formats, layers), nats a token; None where a layer was not scored in a format."""


def loss_table(scores: Scores, tensor: TensorName) -> LossTable:
    """Return the `loss_increase` of keys, or of values; of a measured divergence, what was measured.

    Layers run from 0 to the model's last, skipped and unscored ones included.
    """
    layers = range(layer_count(scores))
    losses = {entry.layer: entry.tensor(tensor).loss_increase or {} for entry in scores.layers}
    formats = scored_formats(scores, tensor)
    return LossTable(
        layers=tuple(layers),
        formats=tuple(form.name for form in formats),
        stored_bits=tuple(form.stored_bits for form in formats),
        nats=tuple(tuple(losses.get(layer, {}).get(form.name) for layer in layers) for form in formats),
    )


class ScoredFormat(NamedTuple):
    """A format that keys, or values, were scored in. Of a name that no cache of such heads can store, bits are None."""

    name: str
    nominal_bits: int | None
    stored_bits: float | None
    """Codes and scales, an element."""


def scored_formats(scores: Scores, tensor: TensorName) -> list[ScoredFormat]:
    """Return the formats that any layer's keys, or values, were scored in: by ascending stored bits, unknown ones last.

    A format's stored bits are those of the first layer that was scored in it.
    """
    head_dims = _head_dims(scores.geometry, tensor)
    found = []
    for name in scores.scored_formats(tensor):
        first = next(entry.layer for entry in scores.layers if name in (entry.tensor(tensor).loss_increase or {}))
        head_dim = head_dims.get(first)
        shape = None if scores.geometry is None else scores.geometry.layers[first]
        try:
            form = format_named(name, stored_like(shape, tensor), head_dim)
            found.append(ScoredFormat(name, form.bits, float(form.stored_bits(head_dim))))
        except UsageError:
            found.append(ScoredFormat(name, None, None))
    return sorted(found, key=lambda form: (form.stored_bits is None, form.stored_bits or 0.0, form.name))


class StoredTensor(NamedTuple):
    """What a plan makes of one layer's keys or values."""

    layer: int
    format: str
    nominal_bits: int
    stored_bits: float
    """Codes and scales, an element."""


def stored_tensors(plan: BitPlan, tensor: TensorName) -> list[StoredTensor]:
    """Return the format and bits of all keys, or of all values, that a plan gives bits to."""
    head_dims = _head_dims(plan.geometry, tensor)
    found = []
    for entry in plan.layers:
        form = entry.tensor(tensor)
        stored = float(form.stored_bits(head_dims.get(entry.layer)))
        found.append(StoredTensor(entry.layer, form.name, form.bits, stored))
    return found


def layer_count(record: Scores | BitPlan | Spectra) -> int:
    """Return how many layers a record's model has; where nothing says it, those up to the last that is named."""
    if record.geometry is not None:
        return record.geometry.num_layers
    return record.model.num_layers if record.model is not None else record.layers[-1].layer + 1


def skipped_layers(record: Scores | BitPlan | Spectra) -> dict[int, str]:
    """Return the layers that no plan gives bits to, as far as a record tells, each with the reason."""
    found = {}
    if record.geometry is not None:
        found = {layer.layer: layer.skipped for layer in record.geometry.layers if layer.skipped is not None}
    if isinstance(record, BitPlan):
        found |= {entry.layer: entry.reason for entry in record.skipped or ()}
    return found


def ranked_results(evaluation: Evaluation) -> list[PlanResult]:
    """Return the evaluated plan and its baselines, the least measured KL first."""
    return sorted(evaluation.plans, key=lambda result: result.kl_nats)


def spread_over(things: Sequence[T], number: int) -> list[T]:
    """Return so many things at most, evenly spaced, the first and the last among them."""
    if len(things) <= number:
        return list(things)
    if number == 1:
        return [things[0]]
    return [things[round(place * (len(things) - 1) / (number - 1))] for place in range(number)]


def _head_dims(geometry: CacheGeometry | None, tensor: TensorName) -> dict[int, int]:
    if geometry is None:
        return {}
    return {layer.layer: head_dim_of(layer, tensor) for layer in geometry.scored}
