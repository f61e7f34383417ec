"""Scores: how sensitive each layer's keys and values are. Read, written, validated.

Made by `profile`, read by `allocate`. Higher means more sensitive. Holds numbers only, no tensors and no bits.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, Tag, TypeAdapter, model_validator
from typing_extensions import Self

from kvprof.errors import InvalidFile, KvprofError, UsageError, did_you_mean
from kvprof.records.document import (
    LATENT,
    PLAIN,
    Count,
    Document,
    Integer,
    LayerIndex,
    ModelInfo,
    Positive,
    Record,
    SparseRecord,
    Text,
    is_absent,
    latent_or_plain,
)
from kvprof.records.effects import MOST_BLOCKS, decode
from kvprof.records.formats import TENSORS, TensorName, format_named
from kvprof.records.geometry import CacheGeometry, check_same_model
from kvprof.records.losses import Losses, contradiction
from kvprof.records.plan import Window, head_dim_of, stored_like

LOSS_INCREASE = "loss_increase"
"""The metric that is a number for each format of a tensor."""

SCALAR_METRICS = ("gradient_norm", "spectral_norm", "frobenius_norm")
"""The metrics that are one number a tensor, the one to prefer first."""

METRICS = (LOSS_INCREASE, *SCALAR_METRICS)
"""All that a budget can be spent by, the one to prefer first."""


def default_unit(metric: str | None) -> Literal["nominal", "stored"]:
    """Return what a budget counts where nobody says: scales too, where the formats are known."""
    return "stored" if metric == LOSS_INCREASE else "nominal"


Metric = Annotated[float, Field(strict=True)]  # NaN too: Scores forbids it in words that name the layer

FLAT_SPREAD = 0.01
"""A metric that varies by no more than this over all layers carries no information."""


class TextShare(SparseRecord):
    """What one source gave to a mix of texts."""

    dataset: Text
    split: Text | None = None
    weight: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 1.0
    """Sequences are taken in proportion to it."""
    sequences: Positive
    tokens: Positive
    column: Text | None = None
    """As `CalibrationInfo` has it."""


class CalibrationInfo(SparseRecord):
    """The text that a measurement read."""

    dataset: Text
    split: Text | None = None
    sequences: Positive
    sequence_length: Positive
    tokens: Positive
    seed: Integer
    fingerprint: Text | None = None
    """sha256 of the token ids."""
    sources: tuple[TextShare, ...] | None = None
    """Where several texts were mixed: each of them."""
    source_of: tuple[Count, ...] | None = None
    """Then, for each sequence, the place of its text among `sources`."""
    sequence_fingerprints: tuple[Text, ...] | None = None
    """Of each sequence's token ids: what two measurements read alike can be compared alone."""
    begins_with: tuple[Text, ...] | None = None
    """The tokens that every sequence begins with, as the tokenizer begins a text; empty where it adds none."""
    column: Text | None = None
    """What of each row was read, as `--column` takes it; of a mix, `sources` say it."""

    @model_validator(mode="after")
    def _each_sequence_is_known(self) -> Self:
        if self.sequence_fingerprints is not None and len(self.sequence_fingerprints) != self.sequences:
            raise ValueError(
                f"sequence_fingerprints has length {len(self.sequence_fingerprints)}, but there are {self.sequences} "
                "sequences"
            )
        return self

    @model_validator(mode="after")
    def _sources_add_up(self) -> Self:
        if self.source_of is None:
            return self
        if self.sources is None:
            raise ValueError("source_of stands without sources; add them, or remove it")
        if len(self.source_of) != self.sequences:
            raise ValueError(f"source_of has length {len(self.source_of)}, but there are {self.sequences} sequences")
        if max(self.source_of) >= len(self.sources):
            raise ValueError(f"source_of names source {max(self.source_of)}, but there are {len(self.sources)}, from 0")
        for place, share in enumerate(self.sources):
            found = self.source_of.count(place)
            if found != share.sequences:
                raise ValueError(f"source_of gives {share.dataset} {found} sequences, sources {share.sequences}")
        return self


class MadeWith(Record):
    """What the numbers of a measurement follow from besides the model, the text and the code of kvprof."""

    device: Text
    """`cpu`, or the name of the GPU."""
    dtype: Text | None = None
    """That the model was held in; null where no model was loaded."""
    versions: dict[Text, Text]
    """Of the libraries that computed."""


class DecodingSetup(Record):
    """The decoder that `loss_increase` speaks of: what it keeps in full precision, and which queries were asked."""

    window: Window
    suffix_fraction: Annotated[float, Field(strict=True, gt=0, le=1)]
    """The share of each sequence, at its end, whose loss counted."""
    tokens: Positive
    """Positions whose loss counted, over all sequences."""


def suffix_start(tokens: int, fraction: float) -> int:
    """Return the first position that counts of a sequence of so many tokens; at least the last one does."""
    return tokens - max(1, round(tokens * fraction))


class EffectBlocks(Record):
    """How the series of `loss_effects` were added up, and over how many blocks they are taken together."""

    block_tokens: Positive
    """Positions of a block; the last one of a sequence may have fewer."""
    bandwidth_blocks: Annotated[int, Field(strict=True, ge=1, le=MOST_BLOCKS)]
    """Products of blocks k apart weigh 1 - k / bandwidth_blocks."""
    tokens: tuple[Positive, ...]
    """Positions that counted, of each sequence."""

    def blocks(self, sequence: int) -> int:
        """Return how many blocks a sequence has."""
        return -(-self.tokens[sequence] // self.block_tokens)


class KlCalibration(Record):
    """How the measured KL of whole plans compares with the sum of their tensors' predicted ones."""

    factor: Annotated[float, Field(strict=True, ge=1e-9, le=1e9, allow_inf_nan=False)]
    """Measured over predicted: errors of many tensors add up with interest. What is off by more predicts nothing."""
    plans: Positive
    sequences: Positive
    spread: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)]
    """The largest ratio, or its inverse, of a measured plan to its prediction by the factor."""


class TensorScores(SparseRecord):
    """What was measured of one layer's keys, or of its values. Every number is finite and not negative."""

    spectral_norm: Metric | None = None
    """Largest singular value of the whole per-layer projection matrix."""
    frobenius_norm: Metric | None = None
    """Root of the sum of squares of the whole per-layer projection matrix."""
    stable_rank: Metric | None = None
    """(frobenius_norm / spectral_norm)^2: how many directions share the norm."""
    head_spectral_norm: tuple[Metric, ...] | None = None
    head_frobenius_norm: tuple[Metric, ...] | None = None
    bias_norm: Metric | None = None
    """L2 norm of the projection's bias."""
    gain_rms: Metric | None = None
    """Root mean square of the gains of the norm that follows the projection (k_norm): sets the cache's scale."""
    gain_max: Metric | None = None
    gradient_norm: Metric | None = None
    """Mean over calibration sequences of the L2 norm of dLoss/dW."""
    gradient_norm_stderr: Metric | None = None
    gradient_norm_samples: tuple[Metric, ...] | None = None
    """Of a shard: each sequence's own norm."""
    loss_increase: dict[Text, Metric] | None = None
    """Format name to predicted increase of the loss, in nats per token."""
    loss_increase_stderr: dict[Text, Metric] | None = None
    """Its standard error over sequences."""
    loss_increase_by_source: dict[Text, dict[Text, Metric]] | None = None
    """Where texts were mixed: the dataset's name to the mean over its sequences alone."""
    loss_increase_samples: dict[Text, tuple[Metric, ...]] | None = None
    """Each sequence's own number; its mean is `loss_increase`."""
    loss_effects: dict[Text, tuple[Text, ...]] | None = None
    """Each sequence's signed first-order effects on the loss, as `records.effects` keeps them."""

    def has(self, metric: str) -> bool:
        """Whether this was measured; a `loss_increase` of no format was not."""
        return getattr(self, metric) not in (None, {})

    @property
    def losses(self) -> Losses:
        """All that is said of `loss_increase`."""
        return Losses(
            self.loss_increase or {},
            self.loss_increase_stderr or {},
            self.loss_increase_by_source or {},
            self.loss_increase_samples or {},
        )


_FIELDS_OF = "a latent one has `latent` and `rope`, every other one `key` and `value`"


class LayerScores(Record):
    """Both tensors of one layer."""

    layer: LayerIndex
    key: TensorScores
    value: TensorScores

    def tensor(self, name: TensorName) -> TensorScores:
        """Return the key's or the value's scores."""
        return self.key if name == "key" else self.value


class LatentScores(Record):
    """Both parts of one layer of latent attention (MLA), which is read as `LayerScores` are."""

    layer: LayerIndex
    latent: TensorScores
    rope: TensorScores

    @property
    def key(self) -> TensorScores:
        """What stands for the keys: the latent."""
        return self.latent

    @property
    def value(self) -> TensorScores:
        """What stands for the values: the rotary part of the keys."""
        return self.rope

    def tensor(self, name: TensorName) -> TensorScores:
        """Return the scores that stand for the key's or the value's."""
        return self.latent if name == "key" else self.rope


AnyLayerScores = LayerScores | LatentScores


def layer_scores(layer: int, key: TensorScores, value: TensorScores, latent: bool) -> AnyLayerScores:
    """Return the entry of a layer. latent: whether it is one of latent attention, with fields of other names."""
    if latent:
        return LatentScores(layer=layer, latent=key, rope=value)
    return LayerScores(layer=layer, key=key, value=value)


_TaggedLayerScores = Annotated[
    Annotated[LayerScores, Tag(PLAIN)] | Annotated[LatentScores, Tag(LATENT)], latent_or_plain()
]


def read_layer_scores(value: object) -> AnyLayerScores:
    """Return one entry of a file's `layers`; raises pydantic's ValidationError for what is none."""
    return _layer_scores_adapter().validate_python(value)


@functools.cache
def _layer_scores_adapter() -> TypeAdapter[AnyLayerScores]:
    return TypeAdapter(_TaggedLayerScores)


class Shard(Record):
    """What makes scores one part of many: which sequences they are of, and what all parts share."""

    number: Positive
    of: Positive
    sequences: tuple[Count, ...]
    """The places of this shard's sequences in the whole text."""
    text: CalibrationInfo
    """The whole text."""
    settings: dict[Text, Any]
    """What every shard of one measurement has alike: model, dtype, formats, window."""
    checksum: Text | None = None
    """sha256 of the file but for this line."""

    @model_validator(mode="after")
    def _sequences_are_of_the_text(self) -> Self:
        if not self.sequences or list(self.sequences) != sorted(set(self.sequences)):
            raise ValueError("sequences must be some of the text's, each once, in ascending order")
        if self.sequences[-1] >= self.text.sequences:
            raise ValueError(
                f"sequences names {self.sequences[-1]}, but the text has {self.text.sequences}, counted from 0"
            )
        return self


class Scores(Document):
    """A file of scores: one entry for each layer that has K and V projections of its own, ascending by layer."""

    kind: ClassVar[str] = "kvprof.scores/1"

    schema_: Literal["kvprof.scores/1"] = Field("kvprof.scores/1", alias="schema")
    source: Text | None = None
    kvprof_version: Text | None = None
    model: ModelInfo | None = None
    calibration: CalibrationInfo | None = None
    geometry: CacheGeometry | None = None
    decoding: DecodingSetup | None = Field(None, exclude_if=is_absent)
    """Of `loss_increase`."""
    effects: EffectBlocks | None = Field(None, exclude_if=is_absent)
    """Of `loss_effects`; null where losses were taken position by position, or measured."""
    kl_calibration: KlCalibration | None = Field(None, exclude_if=is_absent)
    """What `kvprof calibrate` found; null until then."""
    shard: Shard | None = Field(None, exclude_if=is_absent)
    """Of partial scores, which `kvprof merge` adds up; null of whole ones."""
    made_with: MadeWith | None = Field(None, exclude_if=is_absent)
    layers: tuple[_TaggedLayerScores, ...]
    _digest: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _shard_has_its_numbers(self) -> Self:
        if self.shard is None:
            return self
        if self.model is None or self.geometry is None or self.calibration is None:
            raise ValueError("a shard says of which model, geometry and calibration it is")
        count = len(self.shard.sequences)
        if self.calibration.sequences != count:
            raise ValueError(f"shard has {count} sequences, but calibration {self.calibration.sequences}")
        for entry in self.layers:
            for tensor in TENSORS:
                if len(entry.tensor(tensor).gradient_norm_samples or ()) != count:
                    raise ValueError(
                        f"layer {entry.layer}: the {tensor} must have {count} gradient_norm_samples, one a sequence"
                    )
        return self

    @model_validator(mode="after")
    def _numbers_are_finite(self) -> Self:
        for entry in self.layers:
            for tensor in TENSORS:
                for name in TensorScores.model_fields.keys() - {"loss_effects"}:
                    unfit = _unfit(name, getattr(entry.tensor(tensor), name))
                    if unfit is not None:
                        raise ValueError(
                            f"layer {entry.layer}: {unfit[0]} of the {tensor} is {unfit[1]}; "
                            "a metric is a finite, non-negative number"
                        )
        return self

    @model_validator(mode="after")
    def _losses_agree(self) -> Self:
        sequences = None if self.calibration is None else self.calibration.sequences
        sources = None if self.calibration is None else self.calibration.sources
        datasets = None if sources is None else [source.dataset for source in sources]
        for entry in self.layers:
            for tensor in TENSORS:
                losses = entry.tensor(tensor).losses
                problem = contradiction(losses, sequences, datasets)
                if problem is not None:
                    raise ValueError(f"layer {entry.layer}: the {tensor} {problem}")
                sequences = sequences or next(map(len, losses.samples.values()), None)
        return self

    @model_validator(mode="after")
    def _effects_agree(self) -> Self:
        sequences = None if self.calibration is None else self.calibration.sequences
        if self.effects is not None and sequences not in (None, len(self.effects.tokens)):
            raise ValueError(
                f"effects.tokens has length {len(self.effects.tokens)}, but there are {sequences} sequences"
            )
        for entry in self.layers:
            for tensor in TENSORS:
                found = entry.tensor(tensor)
                problem = _effects_problem(found.loss_effects or {}, found.loss_increase or {}, self.effects)
                if problem is not None:
                    raise ValueError(f"layer {entry.layer}: the {tensor} {problem}")
        return self

    @model_validator(mode="after")
    def _layers_are_complete(self) -> Self:
        if not self.layers:
            raise ValueError("layers is empty; there is nothing to allocate")
        found = [entry.layer for entry in self.layers]
        for layer, times in Counter(found).items():
            if times > 1:
                raise ValueError(f"layer {layer} stands {times} times; keep one entry")
        expected = self._expected_layers(max(found))
        for missing in sorted(set(expected) - set(found)):
            raise ValueError(f"layer {missing} is missing; add its entry, or measure again")
        for surplus in sorted(set(found) - set(expected)):
            raise ValueError(f"layer {surplus} has no K and V projections in this model; remove its entry")
        if found != sorted(found):
            raise ValueError("layers must stand in ascending order")
        shapes = self.geometry.layers if self.geometry is not None else ()
        for entry in self.layers if shapes else ():
            if isinstance(entry, LatentScores) != shapes[entry.layer].is_latent:
                raise ValueError(f"layer {entry.layer} is {shapes[entry.layer].kind}: {_FIELDS_OF}")
        if self.geometry and self.model and self.geometry.num_layers != self.model.num_layers:
            raise ValueError(
                f"model.num_layers is {self.model.num_layers}, but the geometry has {self.geometry.num_layers} layers"
            )
        return self

    def _expected_layers(self, last: int) -> list[int]:
        if self.geometry is not None:
            return [layer.layer for layer in self.geometry.scored]
        return list(range(self.model.num_layers if self.model else last + 1))

    @property
    def digest(self) -> str:
        """`sha256:...` of the file's text but for `kl_calibration`: calibrated, they are still the same scores."""
        if self._digest is not None:
            return self._digest
        plain = self if self.kl_calibration is None else self.model_copy(update={"kl_calibration": None})
        return super(Scores, plain).digest

    def _repr_html_(self) -> str:
        """Return the scores as a notebook shows them: each metric of one number a tensor, shaded beside its largest."""
        from kvprof.records.html import page, table

        tables, lines = [], []
        for metric in SCALAR_METRICS:
            if metric not in self.metrics:
                continue
            numbers = {name: [getattr(entry.tensor(name), metric) for entry in self.layers] for name in TENSORS}
            largest = max((number for each in numbers.values() for number in each if number is not None), default=0.0)
            rows = [(name[0].upper(), [_number_cell(number, largest) for number in numbers[name]]) for name in TENSORS]
            tables.append(table([entry.layer for entry in self.layers], rows, metric))
        forms = {name: None for entry in self.layers for t in TENSORS for name in entry.tensor(t).loss_increase or {}}
        if forms:
            lines.append(f"{LOSS_INCREASE} of {len(forms)} formats: {', '.join(forms)}")
        text = self.calibration
        if text is not None:
            lines.append(f"on {text.sequences} sequences of {text.dataset}, {text.tokens} tokens, seed {text.seed}")
        of = self.model.id if self.model is not None and self.model.id is not None else "a model"
        return page(f"{self.source or 'scores'} of {of}", tables, lines)

    def calibrated_as(self, path: Path) -> Self:
        """Return these scores with the factor of a file of the same scores, measured anew since; else as they are."""
        try:
            before = type(self).load(path)
        except KvprofError:
            return self
        if before.kl_calibration is None or before.digest != self.digest:
            return self
        return self.model_copy(update={"kl_calibration": before.kl_calibration})

    def leaving(self, reasons: Mapping[int, str]) -> Scores:
        """Return these scores for plans that leave some sliding layers alone, as `CacheGeometry.leaving` has it.

        They are still the same scores: their digest is that of these.
        """
        geometry = None if self.geometry is None else self.geometry.leaving(reasons)
        if geometry == self.geometry:
            return self
        found = self.model_copy(update={"geometry": geometry})
        found._digest = self.digest
        return found

    def entry(self, layer: int) -> AnyLayerScores | None:
        """Return what was measured of a layer; None where it was not."""
        place = bisect_left(self.layers, layer, key=lambda entry: entry.layer)
        return self.layers[place] if place < len(self.layers) and self.layers[place].layer == layer else None

    @property
    def planned(self) -> tuple[AnyLayerScores, ...]:
        """The entries that a plan covers: all of them, but for those that the geometry skips."""
        if self.geometry is None:
            return self.layers
        layers = {layer.layer for layer in self.geometry.planned}
        return tuple(entry for entry in self.layers if entry.layer in layers)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that can be allocated by, the one to prefer first.

        `loss_increase` is one where every layer that a plan covers has it for both tensors, another where all have it.
        """
        covering = {LOSS_INCREASE: self.planned or self.layers}
        return tuple(
            metric
            for metric in METRICS
            if all(
                entry.tensor(tensor).has(metric) for entry in covering.get(metric, self.layers) for tensor in TENSORS
            )
        )

    def scored_formats(self, tensor: TensorName) -> tuple[str, ...]:
        """Return the names of all formats that keys, or values, of a planned layer have a `loss_increase` of."""
        names: dict[str, None] = {}
        for entry in self.planned:
            names |= dict.fromkeys(entry.tensor(tensor).loss_increase or {})
        return tuple(names)

    @property
    def passed_over(self) -> tuple[str, ...]:
        """The formats of `loss_increase` that no plan can have: another runtime's, or no format of such heads."""
        shapes = {layer.layer: layer for layer in self.geometry.layers} if self.geometry else {}
        names: dict[str, None] = {}
        for entry in self.planned:
            for tensor in TENSORS:
                shape = shapes.get(entry.layer)
                head_dim = None if shape is None else head_dim_of(shape, tensor)
                names |= {
                    name: None
                    for name in entry.tensor(tensor).loss_increase or {}
                    if not _can_be_stored(name, stored_like(shape, tensor), head_dim)
                }
        return tuple(names)

    def metric(self, name: str) -> list[tuple[int, TensorName, float]]:
        """Return (layer, tensor, score) of every tensor for one metric, in file order, key before value.

        Raises UsageError for a metric that kvprof does not know, InvalidFile for one that a layer here lacks.
        """
        if name == LOSS_INCREASE:
            raise UsageError(f"{LOSS_INCREASE} is a number for each format of a tensor, not one a tensor.")
        if name not in SCALAR_METRICS:
            raise UsageError(f"unknown metric {name!r}: {did_you_mean(name, METRICS)}")
        scores = []
        for entry in self.layers:
            for tensor in TENSORS:
                score = getattr(entry.tensor(tensor), name)
                if score is None:
                    have = ", ".join(self.metrics) or "none that every layer has"
                    raise InvalidFile(
                        f"these scores have no {name} for the {tensor} of layer {entry.layer} (they have: {have}).\n"
                        f"  Measure it with `kvprof {'gradients' if name == 'gradient_norm' else 'norms'}`, "
                        "or choose another --metric."
                    )
                scores.append((entry.layer, tensor, score))
        return scores

    def column(self, metric: str, tensor: TensorName) -> list[float]:
        """Return one metric of all keys, or of all values, in layer order; raises as `metric` does."""
        return [score for _, name, score in self.metric(metric) if name == tensor]

    def check_fits(self, geometry: CacheGeometry, fingerprint: str | None = None) -> None:
        """Raise Mismatch, saying how they differ, when the scores are of another model than this one."""
        check_same_model("scores", self.model, self.geometry, geometry, fingerprint)

    def is_flat(self, metric: str, tensor: TensorName) -> bool:
        """Whether a metric varies by no more than 1 % over all layers, and so cannot rank them."""
        numbers = self.column(metric, tensor)
        return len(numbers) > 1 and max(numbers) - min(numbers) <= FLAT_SPREAD * max(numbers)


@functools.cache
def _can_be_stored(name: str, tensor: TensorName, head_dim: int | None) -> bool:
    try:
        format_named(name, tensor, head_dim)
    except UsageError:
        return False
    return True


def _effects_problem(
    effects: Mapping[str, Sequence[str]], losses: Mapping[str, float], blocks: EffectBlocks | None
) -> str | None:
    """Return what is wrong with a tensor's effects, as the predicate of a sentence; None where nothing is."""
    for name, texts in effects.items():
        field = f"loss_effects[{name}]"
        if blocks is None:
            return f"has {field}, but the file has no effects: nothing says how it was added up; remove it"
        if name not in losses:
            return f"has {field} but no loss_increase[{name}]; remove the one, or add the other"
        if len(texts) != len(blocks.tokens):
            return f"has {field} of length {len(texts)}, but effects.tokens of {len(blocks.tokens)} sequences"
        for sequence, text in enumerate(texts):
            try:
                found = len(decode(text)) - 1
            except ValueError as error:
                return f"has {field}[{sequence}] that cannot be read: {error}; measure again"
            if found != blocks.blocks(sequence):
                return f"has {field}[{sequence}] of {found} blocks, where effects says {blocks.blocks(sequence)}"
    return None


def _number_cell(number: float | None, largest: float) -> tuple[str, str, float | None]:
    """Return a number in three digits, in full, and how dark its cell is beside the largest."""
    if number is None:
        return "", "not measured", 0.0
    return f"{number:.3g}", repr(number), 0.48 * number / largest if largest else 0.0


def _unfit(name: str, value: object) -> tuple[str, float] | None:
    """Return the first number of a field that is negative or not finite, with the name that it has in the file."""
    if isinstance(value, tuple) and all(map(math.isfinite, value)) and min(value, default=0) >= 0:
        return None  # the many samples of a file, without a look at each
    if isinstance(value, dict | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return next((found for key, part in parts if (found := _unfit(f"{name}[{key}]", part))), None)
    if isinstance(value, float | int) and not (math.isfinite(value) and value >= 0):
        return name, value
    return None
