"""BitPlan: how many bits each layer's keys and values get. Read, written, validated, and counted in bytes.

Made by `allocate` or by hand, obeyed by the runtime cache. Knows shapes and bits; never sees a score or a tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections import Counter
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag, model_validator
from typing_extensions import Self

from kvprof.errors import KvprofError, Mismatch
from kvprof.records.document import (
    LATENT,
    PLAIN,
    Count,
    Document,
    Integer,
    LayerIndex,
    ModelInfo,
    Number,
    Record,
    Text,
    is_absent,
    latent_or_plain,
)
from kvprof.records.formats import (
    LATENT_TENSORS,
    TENSORS,
    Format,
    TensorName,
    TensorWord,
    format_named,
)
from kvprof.records.geometry import CacheGeometry, KVLayer, bytes_text, check_same_model
from kvprof.records.requests.plan import AllocateRequest
from kvprof.records.requests.request import LayerChoice
from kvprof.records.words import context_text


class TensorPlan(Format):
    """The format of one layer's keys or values, and how much of the recent past it keeps in full precision."""

    recent_fraction: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    """Keep at least this fraction of the tokens seen so far in full precision, besides `recent_tokens`."""


class LayerPlan(Record):
    """Both tensors of one layer."""

    layer: LayerIndex
    key: TensorPlan
    value: TensorPlan

    def tensor(self, name: TensorName) -> TensorPlan:
        """Return the key's or the value's entry."""
        return self.key if name == "key" else self.value


class LatentPlan(Record):
    """Both parts of one layer of latent attention (MLA), which is read as a `LayerPlan` is."""

    layer: LayerIndex
    latent: TensorPlan
    rope: TensorPlan

    @property
    def key(self) -> TensorPlan:
        """What stands for the keys: the latent."""
        return self.latent

    @property
    def value(self) -> TensorPlan:
        """What stands for the values: the rotary part of the keys."""
        return self.rope

    def tensor(self, name: TensorName) -> TensorPlan:
        """Return the entry that stands for the key's or the value's."""
        return self.latent if name == "key" else self.rope


AnyLayerPlan = LayerPlan | LatentPlan


def layer_plan(layer: int, key: TensorPlan, value: TensorPlan, latent: bool) -> AnyLayerPlan:
    """Return the entry of a layer. latent: whether it is one of latent attention, with fields of other names."""
    return LatentPlan(layer=layer, latent=key, rope=value) if latent else LayerPlan(layer=layer, key=key, value=value)


class SkippedLayer(Record):
    """A layer that the plan leaves alone."""

    layer: LayerIndex
    reason: Text


class Quantizer(Record):
    """What the codes are stored with."""

    scale_dtype: Literal["float16", "bfloat16"] = "float16"
    zero_dtype: Literal["float16", "bfloat16"] = "float16"
    rotation_seed: Integer = 0


class Window(Record):
    """Tokens kept in full precision: the first `sink_tokens` and, always, the `recent_tokens` most recent."""

    sink_tokens: Count
    recent_tokens: Count
    own_token_stored: bool = Field(False, strict=True, exclude_if=operator.not_)
    """Whether a query reads its own key and value as the cache stores them; else in full precision, as kvprof's own
    cache has it. Runtimes that write into the cache first and then attend to it read them as stored."""

    def with_tokens(self, sink_tokens: int | None = None, recent_tokens: int | None = None) -> Window:
        """Return the window with other numbers of tokens, where they are given."""
        asked = {"sink_tokens": sink_tokens, "recent_tokens": recent_tokens}
        return self.model_copy(update={name: tokens for name, tokens in asked.items() if tokens is not None})

    @property
    def with_own_token_exact(self) -> Window:
        """The same window of a cache whose queries read their own key and value in full precision."""
        return self.model_copy(update={"own_token_stored": False})


USUAL_WINDOW = Window(sink_tokens=4, recent_tokens=128)
"""What plans keep in full precision where nothing else is said: four sinks cost nothing and spare most of the loss."""


class Budget(Record):
    """What was asked for, and what the plan costs in all three units."""

    requested: Number | None = None
    unit: Literal["nominal", "stored", "bytes"] | None = None
    nominal_bits: Number | None = None
    """Bits of code an element, averaged over the cached width."""
    stored_bits: Number | None = None
    """Nominal bits and the scales, an element."""
    bytes_per_token: Number | None = None
    """Bytes that one more token costs in the long run, of one sequence; null where the geometry is unknown."""


class Solver(Record):
    """How the plan was found."""

    method: Text
    metric: Text | None = None
    objective: Number | None = None
    optimal: bool = False
    target: Text | None = Field(None, exclude_if=is_absent)
    """The runtime that the plan was solved for, within what it can be told."""
    predicted_kl_nats: Number | None = None
    """Of the whole plan, in nats a token, a decoding model's KL divergence from full precision."""
    selection_nats: Number | None = Field(None, exclude_if=is_absent)
    """What of it was added because the plan was chosen by the same sequences that predict it."""
    kl_factor: Number | None = Field(None, exclude_if=is_absent)
    """What was multiplied in: measured over predicted KL of whole plans, from `kvprof calibrate`."""
    lower_bound: Number | None = Field(None, exclude_if=is_absent)
    """No plan within the budget has a smaller objective than this."""
    predicted_kl_stderr_nats: Number | None = Field(None, exclude_if=is_absent)
    """Its standard error over the calibration sequences."""

    @property
    def factor(self) -> float | None:
        """What was multiplied into `predicted_kl_nats`: 1 where nothing was; None where the file does not tell.

        Plans made before there was a `kl_factor` lack it, calibrated or not; they lack `selection_nats` and
        `lower_bound` too. Their prediction was the factor times the objective. In a later plan without a factor the two
        may also differ by what tensors share, so their ratio is not known to be the factor.
        """
        if self.kl_factor is not None or self.predicted_kl_nats is None:
            return self.kl_factor
        later = self.selection_nats is not None or self.lower_bound is not None
        same = self.objective is not None and math.isclose(self.predicted_kl_nats, self.objective, rel_tol=1e-9)
        return 1.0 if later or same else None


class Provenance(Record):
    """What the plan was made from."""

    scores: Text | None = None
    """The digest of the scores."""
    command: Text | None = None
    """For readers."""
    request: AllocateRequest | None = None
    """What was asked for, to make the plan again."""


class BitPlan(Document):
    """A plan file: an entry for each layer of the model, among `layers` or, with the reason, among `skipped`."""

    kind: ClassVar[str] = "kvprof.plan/1"

    schema_: Literal["kvprof.plan/1"] = Field("kvprof.plan/1", alias="schema")
    kvprof_version: Text | None = None
    model: ModelInfo
    budget: Budget | None = None
    quantizer: Quantizer
    window: Window
    geometry: CacheGeometry | None = None
    layers: tuple[
        Annotated[Annotated[LayerPlan, Tag(PLAIN)] | Annotated[LatentPlan, Tag(LATENT)], latent_or_plain()], ...
    ]
    skipped: tuple[SkippedLayer, ...] | None = None
    solver: Solver | None = None
    provenance: Provenance | None = None

    @model_validator(mode="after")
    def _covers_every_layer_once(self) -> Self:
        named = [entry.layer for entry in self.layers] + [entry.layer for entry in self.skipped or ()]
        times = Counter(named)
        for layer in range(self.model.num_layers):
            if layer not in times:
                raise ValueError(f"layer {layer} is missing; add it to `layers`, or to `skipped` with the reason")
        for layer, count in times.items():
            if count > 1:
                raise ValueError(f"layer {layer} stands {count} times; keep one entry")
            if layer >= self.model.num_layers:
                raise ValueError(f"layer {layer} does not exist: model.num_layers is {self.model.num_layers}")
        if not self.layers:
            raise ValueError("layers is empty; the plan gives bits to nothing")
        if [entry.layer for entry in self.layers] != sorted(entry.layer for entry in self.layers):
            raise ValueError("layers must stand in ascending order")
        return self

    @model_validator(mode="after")
    def _agrees_with_its_geometry(self) -> Self:
        if self.geometry is not None and (problem := self.misfit(self.geometry)):
            raise ValueError(f"the plan contradicts its own geometry: {problem}")
        return self

    @property
    def recipe(self) -> str:
        """`sha256:...` of what the plan stores and how: of its layers, quantizer and window, not of its history."""
        fields = self.model_dump(mode="json", include={"quantizer", "window", "layers"})
        return "sha256:" + hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @property
    def reasons(self) -> dict[int, str]:
        """Why layers are left alone, by layer."""
        return {entry.layer: entry.reason for entry in self.skipped or ()}

    @property
    def scores_digest(self) -> str | None:
        """The digest of the scores that the plan says it was made from."""
        return None if self.provenance is None else self.provenance.scores

    def _repr_html_(self) -> str:
        """Return the plan as a notebook shows it: bits of every layer's K and V, formats on hovering; what it costs."""
        from kvprof.records.html import page, table

        entries, reasons = {entry.layer: entry for entry in self.layers}, self.reasons
        layers = range(self.model.num_layers)

        def cell(layer: int, tensor: TensorName) -> tuple[str, str, float | None]:
            if layer in reasons:
                return "16", f"full precision: {reasons[layer]}", None
            return _bits_cell(entries[layer].tensor(tensor))

        rows = [(tensor[0].upper(), [cell(layer, tensor) for layer in layers]) for tensor in TENSORS]
        title = f"bit plan for {self.model.id or 'a model'}" + (f" by {self.solver.method}" if self.solver else "")
        return page(title, [table(layers, rows)], _cost_lines(self))

    def misfit(self, geometry: CacheGeometry) -> str | None:
        """Return why the plan cannot serve a model of this geometry, or None when it can."""
        if geometry.num_layers != self.model.num_layers:
            return f"it has {self.model.num_layers} layers, the model {geometry.num_layers}"
        planned = {layer.layer: layer for layer in geometry.planned}
        for entry in self.layers:
            if entry.layer not in planned:
                return f"it gives bits to layer {entry.layer}, which is a {geometry.layers[entry.layer].skipped}"
            if (problem := _misnamed(entry, planned[entry.layer])) is not None:
                return problem
            for tensor in TENSORS:
                form, head_dim = entry.tensor(tensor), head_dim_of(planned[entry.layer], tensor)
                name = tensor_word(planned[entry.layer], tensor)
                if form.scheme == "rotated" and form.group_size != head_dim:
                    return (
                        f"layer {entry.layer} rotates its {name} in groups of {form.group_size}, "
                        f"but the head dimension is {head_dim}"
                    )
                if form.is_external and not form.is_external_of(head_dim):
                    return (
                        f"layer {entry.layer} stores its {name} as {form.name}, in blocks of {form.group_size}, "
                        f"but the head dimension is {head_dim}"
                    )
        free = {layer.layer for layer in geometry.sliding} & {entry.layer for entry in self.skipped or ()}
        missing = sorted(set(planned) - {entry.layer for entry in self.layers} - free)
        return f"it gives no bits to layer {missing[0]}" if missing else None

    def check_fits(self, geometry: CacheGeometry, fingerprint: str | None = None) -> None:
        """Raise Mismatch, saying how they differ, when the plan is for another model than this one.

        fingerprint: of the model; None where it is not known, and then shapes alone decide.
        """
        problem = self.misfit(geometry)
        if problem is not None:
            raise Mismatch(f"the plan is for another model ({self.model.id or 'unnamed'}): {problem}.")
        check_same_model("plan", self.model, self.geometry, geometry, fingerprint)

    def bytes_at(self, context: int, batch: int = 1) -> int:
        """Bytes of the cache of `batch` sequences of `context` tokens: codes, scales, window, sinks, skipped layers.

        A sliding layer counts its own window, in the model's dtype where it is skipped; an indexer its own keys, in
        full precision; recurrent states stay as they are.
        Raises KvprofError where the plan carries no geometry, or for a negative context or batch.
        """
        if self.geometry is None:
            raise KvprofError(
                "this plan carries no geometry, so its bytes are unknown.\n  Plan from scores that have one."
            )
        if context < 0 or batch < 0:
            raise KvprofError(f"a cache of {batch} sequences of {context} tokens does not exist.")
        plans = {entry.layer: entry for entry in self.layers}
        total = self.geometry.state_bytes(context)
        for layer in self.geometry.layers:
            if layer.layer in plans:
                for tensor in TENSORS:
                    form = plans[layer.layer].tensor(tensor)
                    total += tensor_bytes(
                        form, layer, tensor, self.window, self.geometry.element_bytes, context, form.recent_fraction
                    )
                total += self.geometry.indexer_bytes(layer, context)
            else:
                total += layer.tokens_kept(context) * self.geometry.bytes_per_token(layer)
        return batch * total


def _misnamed(entry: AnyLayerPlan, shape: KVLayer) -> str | None:
    """Return what is wrong with an entry that names other tensors than its layer has, or None."""
    if isinstance(entry, LatentPlan) == shape.is_latent:
        return None
    found, has = ("key and value", "latent and rope") if shape.is_latent else ("latent and rope", "key and value")
    return f"it names {found} of layer {entry.layer}, which has {has}"


def _bits_cell(form: TensorPlan) -> tuple[str, str, float | None]:
    """Return the bits of a tensor, the format's name, and how dark the cell is."""
    recent = f", the last {form.recent_fraction:.0%} in full precision" if form.recent_fraction else ""
    # Of 16 bits, which a plan seldom has, no darker than of 8: the text must stay readable on any page.
    return str(form.bits), form.name + recent, 0.06 * min(form.bits, 8)


def _cost_lines(plan: BitPlan) -> list[str]:
    """Return what a plan costs in every unit that it knows, and what it keeps in full precision."""
    lines = []
    budget = plan.budget
    if budget is not None:
        known = (
            (budget.nominal_bits, "nominal bits an element"),
            (budget.stored_bits, "stored bits an element"),
            (budget.bytes_per_token, "bytes a token"),
        )
        if parts := [f"{number:.6g} {unit}" for number, unit in known if number is not None]:
            lines.append("costs " + ", ".join(parts))
    if plan.geometry is not None:
        at = [f"{bytes_text(plan.bytes_at(context))} at {context_text(context)}" for context in plan.geometry.contexts]
        lines.append(f"cache of one sequence: {', '.join(at)} tokens")
    window = plan.window
    lines.append(f"in full precision: the first {window.sink_tokens} and the last {window.recent_tokens} tokens")
    if plan.solver is not None and plan.solver.predicted_kl_nats is not None:
        lines.append(f"predicted KL divergence: {plan.solver.predicted_kl_nats:.3g} nats a token")
    return lines


def layers_left_alone(
    geometry: CacheGeometry, choice: LayerChoice, window: Window, context: int | None = None
) -> dict[int, str]:
    """Return the sliding layers that a plan leaves alone, and why.

    choice: `full` leaves all of them, `all` those of which nothing would be quantized in `context` tokens, by default
    in any number of them: the plan's own window holds all that their queries see.
    """
    left = {}
    for layer in geometry.sliding:
        assert layer.window is not None
        seen = layer.window if context is None else min(context, layer.window)
        # Of the sinks, those before the window are no longer seen: of a long text, all of them.
        sinks = 0 if context is None else max(0, window.sink_tokens - (context - seen))
        if choice == "full":
            left[layer.layer] = layer.window_text
        elif seen <= sinks + window.recent_tokens:
            left[layer.layer] = f"{layer.window_text}, no more than stay in full precision"
    return left


def covered_geometry(
    geometry: CacheGeometry, choice: LayerChoice, window: Window, context: int | None = None
) -> CacheGeometry:
    """Return the geometry of a plan that leaves alone what `layers_left_alone` says."""
    return geometry.leaving(layers_left_alone(geometry, choice, window, context))


def head_dim_of(layer: KVLayer, tensor: TensorName) -> int:
    """Return the head dimension of a layer's keys or values."""
    return layer.key_head_dim if tensor == "key" else layer.value_head_dim


def stored_like(layer: KVLayer | None, tensor: TensorName) -> TensorName:
    """Return whose formats a tensor has: both parts of a latent are made into keys, and are grouped as these."""
    return "key" if layer is not None and layer.is_latent else tensor


def tensor_word(layer: KVLayer | None, tensor: TensorName) -> TensorWord:
    """Return what a layer's tensor is called: `key`, `value`, or `latent` and `rope` in their place."""
    return LATENT_TENSORS[tensor] if layer is not None and layer.is_latent else tensor


def format_of(layer: KVLayer, tensor: TensorName, name: str) -> Format:
    """Return the format of a name as a tensor of a layer has it; raises UsageError as `format_named` does."""
    return format_named(name, stored_like(layer, tensor), head_dim_of(layer, tensor))


def quantized_tokens(form: Format, window: Window, context: int, recent_fraction: float = 0.0) -> int:
    """Tokens of one sequence that are held as codes once `context` tokens are in the cache.

    Groups start after the sinks; a token (axis `token`) or group of tokens (axis `channel`) is quantized exactly when
    at least `recent_tokens` tokens follow it, or the larger `recent_fraction` of all tokens.
    """
    if form.is_full:
        return 0
    recent = window.recent_tokens
    if recent_fraction:  # asked for every token of every layer, so spared the fractions where there are none
        recent = max(recent, math.ceil(Fraction(str(recent_fraction)) * context))
    left = max(0, context - window.sink_tokens - recent)
    return left // form.unit_tokens * form.unit_tokens


def tokens_read_as_codes(form: Format, window: Window, position: int, recent_fraction: float = 0.0) -> int:
    """Return how many tokens behind the sinks the query at a position reads as codes, its own token among them or not.

    position: of the query, from 0. It reads the cache as it is before its own token is stored, with that in full
    precision, or after.
    """
    return quantized_tokens(form, window, position + window.own_token_stored, recent_fraction)


def oldest_held(form: Format, window: Window, span: int | None, context: int, head_dim: int) -> int:
    """Position of the oldest token that is held once `context` tokens are in the cache.

    span: how many tokens a query of the layer sees; None for all, and then it is 0. What no query will see again is let
    go: sinks token by token, what is behind them in whole units, in eights where only these fill whole bytes.
    """
    unseen = 0 if span is None else max(0, context - span)
    sinks = 0 if form.is_full else window.sink_tokens
    if unseen <= sinks:
        return unseen
    step = form.unit_tokens if form.is_full or form.fills_bytes(head_dim) else 8 * form.unit_tokens
    return sinks + (unseen - sinks) // step * step


def tensor_bytes(
    form: Format,
    layer: KVLayer,
    tensor: TensorName,
    window: Window,
    element_bytes: int,
    context: int,
    recent_fraction: float = 0.0,
) -> int:
    """Bytes of one tensor of one layer, of one sequence of `context` tokens: codes, scales and window.

    Of a layer that slides, those of the tokens that are held: its window, and what is left of the unit before it.
    """
    head_dim = head_dim_of(layer, tensor)
    width = layer.kv_heads * head_dim
    oldest = oldest_held(form, window, layer.window, context, head_dim)
    gone = max(0, oldest - window.sink_tokens)  # behind the sinks, of which codes come first
    tokens = max(0, quantized_tokens(form, window, context, recent_fraction) - gone)
    full_bytes = (context - oldest - tokens) * width * element_bytes
    if tokens == 0:
        return full_bytes
    if form.axis == "channel":
        groups = tokens // form.group_size * width
    else:
        groups = tokens * layer.kv_heads * -(-head_dim // form.group_size)
    return full_bytes + -(-(tokens * width * form.bits + groups * form.group_bits) // 8)
