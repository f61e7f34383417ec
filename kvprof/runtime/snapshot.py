"""A PlanCache as a .safetensors file: a prompt read once, a conversation to go on with tomorrow.

Writes every tensor under its layer and name, and the plan and the lengths in the header; reads it back only for the
model that wrote it. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from kvprof import __version__
from kvprof.errors import CacheError, InvalidFile, Mismatch, OutputError, first_line
from kvprof.models.recurrent_states import state_tensors
from kvprof.records.document import Count, Positive, Record
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import BitPlan, oldest_held, quantized_tokens
from kvprof.runtime.layers import PlannedIndexedLayer, PlannedLayer, planned_layer
from kvprof.runtime.store import TensorStore
from kvprof.storage.atomic import replaced_when_whole

SCHEMA = "kvprof.cache/2"

KNOWN_LAYERS = {
    "DynamicLayer",
    "DynamicIndexedLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
}
"""Of transformers' own layers, those of which it is known what they hold; by name, since no version has them all."""


class LayerFacts(Record):
    """What must be known of a layer, besides its tensors, to go on."""

    batch: Positive | None = None
    """Sequences held; null where nothing came yet."""
    tokens: Count | None = None
    """Tokens of one sequence seen; null where nothing came yet, and for a recurrent layer, which does not count."""
    repeats: Positive = 1
    """How often the model brings each KV head of a planned layer."""
    recording: bool = False
    """Whether more is held than a step needs, for a crop to come."""
    convolutions: dict[int, Positive] = Field(default_factory=dict)
    """The width of each convolution whose inputs are held, by the number of its state."""
    recurrent: tuple[Count, ...] = ()
    """The numbers of the recurrent states that are held."""
    seen: tuple[Count, ...] = ()
    """The numbers of the states that have read tokens."""


def save_layers(plan: BitPlan, layers: Sequence[Any], path: Path) -> Path:
    """Write a cache's plan and layers; raises CacheError where they could not be read back, OutputError."""
    tensors: dict[str, Tensor] = {}
    facts = []
    for index, layer in enumerate(layers):
        if planned_layer(layer) is None and type(layer).__name__ not in KNOWN_LAYERS:
            raise CacheError(f"layer {index} is a {type(layer).__name__}, which kvprof cannot save.")
        tensors |= {f"layers.{index}.{name}": tensor.contiguous() for name, tensor in _take(layer).items()}
        facts.append(_facts(layer).model_dump(mode="json"))
    held, promised = _full_dtypes(layers), _geometry(plan).dtype
    if held - {promised}:
        raise CacheError(
            f"the cache holds numbers in {' and '.join(sorted(held))}, the model is loaded in {promised}.\n"
            "  Fill a cache without autocast, and save that: only then can it be read back."
        )
    header = {
        "schema": SCHEMA,
        "kvprof_version": __version__,
        "plan": plan.to_text(),
        "layers": json.dumps(facts),
    }
    with replaced_when_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:
            raise OutputError(f"cannot write {path}: {first_line(error)}.") from None
    return path


@dataclass(frozen=True)
class Snapshot:
    """What a cache's file holds. facts: of each layer. tensors: by `layers.<index>.<name>`, until they are moved."""

    path: Path
    plan: BitPlan
    facts: Sequence[LayerFacts]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        """Read a cache's file; raises InvalidFile."""
        header, tensors = _read(path)
        try:
            plan = BitPlan.from_json(json.loads(header["plan"]), f"{path} (its plan)")
            facts = [LayerFacts.model_validate(fact) for fact in json.loads(header["layers"])]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidFile(f"{path}: truncated or corrupt: its header is damaged: {first_line(error)}.") from None
        return cls(path, plan, facts, tensors)

    def fill(self, plan: BitPlan, layers: Sequence[Any], model: PreTrainedModel) -> None:
        """Move the tensors into the empty layers of a cache that was made for the model from this plan.

        plan: the cache's own, its geometry in the dtype that the model is loaded in. Raises InvalidFile, Mismatch.
        """
        saved, own, path = self.plan.geometry, _geometry(plan), self.path
        if saved is None or saved.dtype != own.dtype:
            raise Mismatch(
                f"{path} holds keys and values in {saved.dtype if saved else 'an unknown dtype'}, "
                f"the model is loaded in {own.dtype}.\n  Load the model as it was when the cache was saved."
            )
        try:
            self._fill(layers, own, model)
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
            raise InvalidFile(f"{path}: truncated or corrupt: {first_line(error)}.") from None

    def _fill(self, layers: Sequence[Any], own: CacheGeometry, model: PreTrainedModel) -> None:
        tensors = self.tensors
        if len(self.facts) != len(layers):
            raise ValueError(f"it has {len(self.facts)} layers, the model {len(layers)}")
        if any(len({fact[name] for fact in map(dict, self.facts)} - {None}) > 1 for name in ("batch", "tokens")):
            raise ValueError("its layers hold different numbers of tokens or sequences")
        for index, (layer, fact) in enumerate(zip(layers, self.facts, strict=True)):
            prefix = f"layers.{index}."
            names = [name for name in tensors if name.startswith(prefix)]
            given = {name.removeprefix(prefix): tensors.pop(name) for name in names}
            _give(layer, given, fact, own.layers[index], model)
            if given:
                raise ValueError(f"{prefix}{next(iter(given))} belongs to no layer of this kind")
        if tensors:
            raise ValueError(f"{next(iter(tensors))} belongs to no layer")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the header of a cache file, and its tensors by name, in memory of their own."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("schema") != SCHEMA:
                raise InvalidFile(
                    f"{path} holds no cache of kvprof's: its schema is {header.get('schema')!r}, expected {SCHEMA!r}."
                )
            names = list(file.keys())
            return header, {name: file.get_tensor(name).clone() for name in names}
    except FileNotFoundError:
        raise InvalidFile(f"{path}: no such file.") from None
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be read: {error.strerror or first_line(error)}.") from None
    except SafetensorError as error:
        raise InvalidFile(f"{path}: truncated or corrupt: {first_line(error)}.") from None


def _take(layer: Any) -> dict[str, Tensor]:
    """Return a layer's tensors by name."""
    tensors: dict[str, Tensor] = {}
    planned = planned_layer(layer)
    if planned is not None:
        for name, store in zip(("key", "value"), planned.stores, strict=True):
            tensors |= {f"{name}.{part}": tensor for part, tensor in store.named_tensors()}
        if isinstance(planned, PlannedIndexedLayer) and planned.indexer_keys is not None:
            tensors["indexer"] = planned.indexer_keys
    elif isinstance(layer, DynamicLayer) and layer.is_initialized:
        tensors = {"keys": layer.keys, "values": layer.values}
        if (indexed := getattr(layer, "indexer_keys", None)) is not None:
            tensors["indexer"] = indexed
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
            tensors |= {f"{name}.{number}": state for number, state in states.items() if state is not None}
    return tensors


def _facts(layer: Any) -> LayerFacts:
    """Return what else must be known of a layer."""
    facts: dict[str, Any] = {"recording": getattr(layer, "record_past", False)}
    planned = planned_layer(layer)
    if planned is not None and planned.is_initialized:
        facts |= {"batch": planned.batch, "tokens": planned.get_seq_length(), "repeats": planned.repeats}
    elif planned is None and isinstance(layer, DynamicLayer) and layer.is_initialized:
        facts |= {"batch": layer.keys.shape[0], "tokens": layer.get_seq_length()}
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        widths = layer.conv_kernel_size
        facts["convolutions"] = {number: widths[number] for number, x in layer.conv_states.items() if x is not None}
        facts["recurrent"] = [number for number, x in layer.recurrent_states.items() if x is not None]
        facts["seen"] = [number for number, seen in layer.has_previous_state.items() if seen]
        for state in state_tensors(layer):
            facts["batch"] = state.shape[0]
    return LayerFacts(**facts)


def _give(layer: Any, tensors: dict[str, Tensor], fact: LayerFacts, shape: KVLayer, model: PreTrainedModel) -> None:
    """Put into an empty layer what `_take` took out of a full one, and out of `tensors`; raises where it cannot be."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        _give_states(layer, tensors, fact, model)
    planned = planned_layer(layer)
    if planned is not None:
        _give_planned(planned, tensors, fact, model)
    elif isinstance(layer, DynamicLayer) and fact.tokens is not None:
        keys, values = (tensors.pop(name).to(model.device) for name in ("keys", "values"))
        needed = fact.tokens
        if isinstance(layer, DynamicSlidingWindowLayer):
            needed = min(fact.tokens, layer.sliding_window - 1)
        for held, head_dim in ((keys, shape.key_head_dim), (values, shape.value_head_dim)):
            batch, heads, tokens, width = held.shape
            fits = tokens == needed or (fact.recording and needed < tokens <= fact.tokens)
            if shape.keeps_tokens:
                fits = fits and heads % shape.kv_heads == 0 and width == head_dim
            if not fits or batch != fact.batch or held.dtype != model.dtype:
                raise ValueError(f"layer {shape.layer} holds {held.dtype} of {tuple(held.shape)}, which does not fit")
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if shape.indexer_width:
            layer.update_indexer(_indexer_keys(tensors, fact, shape, model).to(model.device))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = fact.tokens
    if hasattr(layer, "record_past"):
        layer.record_past = fact.recording


def _give_planned(planned: PlannedLayer, tensors: dict[str, Tensor], fact: LayerFacts, model: PreTrainedModel) -> None:
    if fact.tokens is None or fact.batch is None:
        return
    planned.dtype, planned.device = model.dtype, torch.device("cpu")  # moved when the first token comes
    planned.batch, planned.repeats = fact.batch, fact.repeats
    for name, store in zip(("key", "value"), planned.stores, strict=True):
        names = [part for part in tensors if part.startswith(f"{name}.")]
        store.restore({part.removeprefix(f"{name}."): tensors.pop(part) for part in names}, fact.batch, model.dtype)
        store.oldest = fact.tokens - store.held
        if not _obeys(store, fact):
            raise ValueError(f"the {name}s of layer {planned.shape.layer} are not cut as the plan says")
    if isinstance(planned, PlannedIndexedLayer):
        planned.indexer_keys = _indexer_keys(tensors, fact, planned.shape, model)
    planned.is_initialized = True


def _indexer_keys(tensors: dict[str, Tensor], fact: LayerFacts, shape: KVLayer, model: PreTrainedModel) -> Tensor:
    """Take the keys of a layer's indexer, (B, T, width), out of its tensors."""
    keys, size = tensors.pop("indexer"), (fact.batch, fact.tokens, shape.indexer_width)
    if keys.shape != size or keys.dtype != model.dtype:
        raise ValueError(f"the indexer of layer {shape.layer} holds no {size} of {model.dtype}")
    return keys


def _obeys(store: TensorStore, fact: LayerFacts) -> bool:
    """Whether sinks, codes and window are as long as the plan says of so many tokens, and none is held too few."""
    assert fact.tokens is not None
    oldest = _oldest_held(store, fact.tokens)
    if fact.recording and 0 <= store.oldest < oldest:  # what was let go before recording began: whole groups too
        oldest = _oldest_held(store, store.oldest + (store.span or 0))
    sinks = 0 if store.form.is_full else store.window.sink_tokens
    coded = quantized_tokens(store.form, store.window, fact.tokens, store.form.recent_fraction)
    coded = max(0, coded - max(0, store.oldest - sinks))
    return (
        store.oldest == oldest
        and store.sinks.tokens == max(0, min(sinks, fact.tokens) - store.oldest)
        and (store.codes.tokens == coded or (fact.recording and store.codes.tokens < coded))
    )


def _oldest_held(store: TensorStore, tokens: int) -> int:
    return oldest_held(store.form, store.window, store.span, tokens, store.codes.head_dim)


def _give_states(layer: Any, tensors: dict[str, Tensor], fact: LayerFacts, model: PreTrainedModel) -> None:
    def take(name: str) -> Tensor:
        state = tensors.pop(name).to(model.device)
        if state.shape[0] != fact.batch:
            raise ValueError(f"{name} is of {state.shape[0]} sequences, not of {fact.batch}")
        return state

    if not {*fact.convolutions, *fact.recurrent, *fact.seen} <= set(range(layer.number_of_states)):
        raise ValueError(f"a layer has {layer.number_of_states} states, not more")
    for number, width in fact.convolutions.items():
        state = take(f"conv.{number}")
        layer.lazy_initialization(conv_states=state, state_idx=number, conv_kernel_size=width)
        layer.conv_states[number] = state
    for number in fact.recurrent:
        state = take(f"recurrent.{number}")
        layer.lazy_initialization(recurrent_states=state, state_idx=number)
        layer.recurrent_states[number] = state
    layer.has_previous_state.update(dict.fromkeys(fact.seen, True))


def _geometry(plan: BitPlan) -> CacheGeometry:
    assert plan.geometry is not None  # of a cache's plan: `from_plan` put the model's own there
    return plan.geometry


def _full_dtypes(layers: Sequence[Any]) -> set[str]:
    """Return the dtypes of what planned layers hold in full precision."""
    planned = [planned_layer(layer) for layer in layers]
    stores = [store for layer in planned if layer is not None for store in layer.stores]
    blocks = [block for store in stores for block in (*store.sinks.blocks, *store.recent.blocks)]
    return {str(block.dtype).removeprefix("torch.") for block in blocks}
