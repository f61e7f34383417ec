"""What a model caches: KV heads and head dimensions layer by layer, and which layers a plan leaves alone, and why.

Holds shapes only: no weights, no bits. Made by `models.inventory`; carried inside Scores and BitPlan files.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from kvprof.errors import Mismatch
from kvprof.records.document import Count, LayerIndex, ModelInfo, Positive, Record, Text, is_absent
from kvprof.records.words import short_digest

LayerKind = Literal["full", "sliding", "chunked", "shared", "recurrent", "hybrid", "latent", "cross", "none", "other"]
"""full: keys and values of every token. sliding, chunked: of the last `window` tokens only. shared: reads another
layer's. recurrent: a state of fixed size. hybrid: full attention and a recurrent state side by side. latent: of
every token one compressed vector (MLA), which stands here for a head's key, and the rotary part of all heads' keys,
which stands for its value. cross:
keys and values of an image or sound, as many as there are of it, none of the text. none: no attention at all. other: a
cache that kvprof does not know."""

DType = Literal["float32", "float16", "bfloat16", "float64"]
CONTEXTS = (4096, 32768, 131072)
"""Tokens of context that the size of a cache is told at, for a model made for so many."""

ELEMENT_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class RecurrentState(Record):
    """What a layer keeps of one sequence beside keys and values, or in their place, however long it is."""

    elements: Count
    """Numbers in the model's dtype."""
    float32_elements: Count
    """Numbers in float32, whatever the model's dtype."""


class KVLayer(Record):
    """What one decoder layer caches for each token, and of each sequence."""

    layer: LayerIndex
    kind: LayerKind
    kv_heads: Count
    key_head_dim: Count
    value_head_dim: Count
    window: Positive | None = None
    """Tokens that a sliding or chunked layer keeps at most."""
    skipped: Text | None = None
    """Why no plan gives this layer bits; null for a layer that plans cover, if they do not leave it, as it slides."""
    values_of_key_projection: bool = Field(False, exclude_if=operator.not_)
    """Whether W_v is W_k: the values are made of what the keys' matrix puts out, and are cached beside the keys."""
    indexer_width: Count = Field(0, exclude_if=operator.not_)
    """Numbers of each token that a sparse attention's indexer caches beside the rest; no plan rounds them."""
    state: RecurrentState | None = Field(None, exclude_if=is_absent)
    """Absent where there is none, or nobody knows its size."""
    block_of: LayerIndex | None = Field(None, exclude_if=is_absent)
    """The first layer that runs the same block with the same weights (Zamba); each has a cache of its own. Absent for
    a layer whose weights are its own, and for that first one."""

    @property
    def key_width(self) -> int:
        """Cached key elements a token: kv_heads * key_head_dim."""
        return self.kv_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Cached value elements a token: kv_heads * value_head_dim."""
        return self.kv_heads * self.value_head_dim

    @property
    def window_text(self) -> str:
        """What a layer that slides is called: `sliding window of 512 tokens`."""
        return f"{'attention chunk' if self.kind == 'chunked' else 'sliding window'} of {self.window} tokens"

    @property
    def is_latent(self) -> bool:
        """Whether `latent` and `rope` stand in the place of `key` and `value` (MLA)."""
        return self.kind == "latent"

    @property
    def has_projections(self) -> bool:
        """Whether the layer projects what it caches, so that it can be scored."""
        return self.kind in ("full", "sliding", "chunked", "hybrid") or (self.is_latent and self.skipped is None)

    @property
    def keeps_tokens(self) -> bool:
        """Whether the layer holds something of each token: keys and values, or what both are made from."""
        return self.has_projections or self.is_latent

    def tokens_kept(self, context: int) -> int:
        """Tokens of which this layer holds something once `context` tokens have been read."""
        if not self.keeps_tokens:
            return 0
        return context if self.window is None else min(context, self.window)


class CacheGeometry(Record):
    """The cache of one model, layer by layer."""

    dtype: DType
    """The dtype of the checkpoint, which an unquantized cache would have."""
    layers: tuple[KVLayer, ...]
    positions: Positive | None = Field(None, exclude_if=is_absent)
    """Tokens of context that the model was made for; absent where its config sets no limit, or nobody said."""

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        if not self.layers:
            raise ValueError("geometry layers is empty; a model has at least one layer")
        if [layer.layer for layer in self.layers] != list(range(len(self.layers))):
            raise ValueError("geometry layers must be numbered 0, 1, 2, ... without a gap")
        for layer in self.layers:
            if layer.skipped is not None:
                continue
            if 0 in (layer.key_width, layer.value_width):
                raise ValueError(f"geometry layer {layer.layer} caches nothing, yet names no reason to be skipped")
            if not layer.has_projections:
                raise ValueError(
                    f"geometry layer {layer.layer} ({layer.kind}) keeps no tokens' own keys and values, "
                    "yet names no reason to be skipped"
                )
        return self

    def leaving(self, reasons: Mapping[int, str]) -> CacheGeometry:
        """Return the geometry of a plan that leaves some of the sliding layers alone.

        reasons: why, by layer; those of layers that do not slide change nothing.
        """
        left = {layer.layer for layer in self.sliding if layer.layer in reasons}
        layers = (
            layer.model_copy(update={"skipped": reasons[layer.layer]}) if layer.layer in left else layer
            for layer in self.layers
        )
        return self.model_copy(update={"layers": tuple(layers)}) if left else self

    @property
    def sliding(self) -> tuple[KVLayer, ...]:
        """The layers that a plan may cover, or leave alone: they keep a window of tokens only."""
        return tuple(layer for layer in self.planned if layer.window is not None)

    @property
    def is_hybrid(self) -> bool:
        """Whether layers with a recurrent state stand among those with keys and values, or in one with them."""
        return any(layer.kind in ("recurrent", "hybrid") for layer in self.layers)

    @property
    def contexts(self) -> tuple[int, ...]:
        """CONTEXTS, none beyond what the model was made for, which then stands last."""
        return tuple(dict.fromkeys(min(tokens, self.positions or tokens) for tokens in CONTEXTS))

    @property
    def num_layers(self) -> int:
        """Decoder layers, skipped ones included."""
        return len(self.layers)

    @property
    def planned(self) -> tuple[KVLayer, ...]:
        """The layers that a plan covers; it may leave alone those that slide."""
        return tuple(layer for layer in self.layers if layer.skipped is None)

    @property
    def scored(self) -> tuple[KVLayer, ...]:
        """The layers that have K and V projections of their own."""
        return tuple(layer for layer in self.layers if layer.has_projections)

    @property
    def shared_blocks(self) -> dict[int, tuple[int, ...]]:
        """The layers that run one block, by the first of them; of blocks that several layers run."""
        found: dict[int, tuple[int, ...]] = {}
        for layer in self.layers:
            if layer.block_of is not None:
                found[layer.block_of] = (*found.get(layer.block_of, (layer.block_of,)), layer.layer)
        return found

    @property
    def reasons(self) -> str:
        """Why layers are skipped, each reason once."""
        return "; ".join(dict.fromkeys(layer.skipped for layer in self.layers if layer.skipped is not None))

    @property
    def unknown(self) -> tuple[KVLayer, ...]:
        """The layers whose cache kvprof does not know, and cannot count."""
        return tuple(layer for layer in self.layers if layer.kind == "other")

    @property
    def growing(self) -> tuple[KVLayer, ...]:
        """The layers that keep keys and values, or latents, of every token."""
        return tuple(layer for layer in self.layers if layer.keeps_tokens and layer.window is None)

    @property
    def uncounted(self) -> tuple[KVLayer, ...]:
        """The layers whose recurrent state has a size that is not known: no number of bytes holds it."""
        return tuple(layer for layer in self.layers if layer.kind in ("recurrent", "hybrid") and layer.state is None)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element in the model's dtype."""
        return ELEMENT_BYTES[self.dtype]

    def bytes_per_token(self, layer: KVLayer) -> int:
        """Bytes that one more token adds to an unquantized layer, before any window is full."""
        width = layer.key_width + layer.value_width + layer.indexer_width
        return width * self.element_bytes if layer.keeps_tokens else 0

    def indexer_bytes(self, layer: KVLayer, context: int) -> int:
        """Bytes of what a layer's indexer keeps of one sequence of `context` tokens."""
        return layer.tokens_kept(context) * layer.indexer_width * self.element_bytes

    def state_bytes(self, context: int = 1) -> int:
        """Bytes of the recurrent states of one sequence, as far as their sizes are known; none of an empty one."""
        states = [layer.state for layer in self.layers if layer.state is not None] if context else []
        return sum(state.elements * self.element_bytes + state.float32_elements * 4 for state in states)

    def bytes_at(self, context: int, batch: int = 1) -> int:
        """Bytes of the unquantized cache of `batch` sequences of `context` tokens, recurrent states included."""
        tokens = sum(layer.tokens_kept(context) * self.bytes_per_token(layer) for layer in self.layers)
        return batch * (tokens + self.state_bytes(context))


def check_same_model(
    what: str,
    model: ModelInfo | None,
    own: CacheGeometry | None,
    geometry: CacheGeometry,
    fingerprint: str | None = None,
) -> None:
    """Raise Mismatch when a file (`what`) that names `model` and its `own` geometry is not of the model at hand.

    geometry, fingerprint: of the model at hand; what either side does not know is not compared. The wording of a reason
    to skip a layer does not count.
    """
    problem = None
    if own is not None:
        if own.num_layers != geometry.num_layers:
            problem = f"it has {own.num_layers} layers, this model {geometry.num_layers}"
        for was, now in zip(own.layers, geometry.layers):  # noqa: B905 - a difference in length is named above
            if problem is None and _shape(was) != _shape(now):
                problem = f"its layer {was.layer} is {_shape(was)}, this model's {_shape(now)}"
    elif model is not None and model.num_layers != geometry.num_layers:
        problem = f"it has {model.num_layers} layers, this model {geometry.num_layers}"
    known = None if model is None else model.fingerprint
    if problem is None and None not in (known, fingerprint) and known != fingerprint:
        problem = f"its fingerprint is {short_digest(known)}, this model's {short_digest(fingerprint)}"
    if problem is not None:
        name = model.id if model is not None and model.id else "unnamed"
        raise Mismatch(
            f"the {what} is for another model ({name}): {problem}.\n"
            "  Name its own model, or measure this one: kvprof norms, kvprof gradients, kvprof allocate."
        )


def _shape(layer: KVLayer) -> str:
    heads = f"{layer.kv_heads} KV heads of {layer.key_head_dim} and {layer.value_head_dim}"
    if layer.is_latent:
        heads = f"a latent of {layer.key_head_dim} and a rotary part of {layer.value_head_dim}"
        heads += f", an indexer of {layer.indexer_width}" if layer.indexer_width else ""
    return f"{layer.kind} attention, {heads}" + (f", window {layer.window}" if layer.window else "")


def bytes_text(count: float) -> str:
    """Return a number of bytes in the largest binary unit that keeps it above 1: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError
