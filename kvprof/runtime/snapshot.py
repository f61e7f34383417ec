"""A PlanCache as a .safetensors file: a prompt read once, a conversation to go on with tomorrow.

Writes every tensor under its layer and name, and the plan and the lengths in the header; reads it back only for the
model that wrote it. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from kvprof import __version__
from kvprof.errors import CacheError, InvalidFile, Mismatch
from kvprof.records.plan import BitPlan
from kvprof.records.runs import replaced_when_whole
from kvprof.runtime.cache import PlanCache, PlannedLayer, planned_layer

SCHEMA = "kvprof.cache/1"


def save_cache(cache: PlanCache, path: Path) -> Path:
    """Write a cache; raises CacheError for a layer of transformers' that is of no known kind, OutputError."""
    tensors: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        found, fact = _take(layer, index)
        tensors |= {f"layers.{index}.{name}": tensor.contiguous() for name, tensor in found.items()}
        facts.append(fact)
    header = {
        "schema": SCHEMA,
        "kvprof_version": __version__,
        "plan": cache.plan.to_text(),
        "layers": json.dumps(facts),
    }
    with replaced_when_whole(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    return path


def load_cache(path: Path, model: PreTrainedModel) -> PlanCache:
    """Read a cache for the model that wrote it; raises InvalidFile, Mismatch."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("schema") != SCHEMA:
                raise InvalidFile(f"{path}: no cache of kvprof's: its schema is {header.get('schema')!r}.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        plan = BitPlan.from_json(json.loads(header["plan"]), f"{path} (its plan)")
        facts = json.loads(header["layers"])
    except FileNotFoundError:
        raise InvalidFile(f"{path}: no such file.") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InvalidFile(f"{path}: truncated or corrupt: {error}") from None
    saved_dtype = plan.geometry.dtype if plan.geometry is not None else None
    own_dtype = str(model.dtype).removeprefix("torch.")
    if saved_dtype != own_dtype:
        raise Mismatch(
            f"{path} holds keys and values in {saved_dtype}, the model is loaded in {own_dtype}.\n"
            f"  Load the model in {saved_dtype}."
        )
    cache = PlanCache.from_plan(plan, model)
    try:
        if len(facts) != len(cache.layers):
            raise ValueError(f"it has {len(facts)} layers, the model {len(cache.layers)}")
        for index, (layer, fact) in enumerate(zip(cache.layers, facts, strict=True)):
            prefix = f"layers.{index}."
            own = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            _give(layer, own, fact, model)
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise InvalidFile(f"{path}: truncated or corrupt: layer {index}: {error}") from None
    return cache


def _take(layer: Any, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a layer's tensors by name, and what else must be known to go on."""
    tensors: dict[str, Tensor] = {}
    fact: dict[str, Any] = {}
    planned = planned_layer(layer)
    if planned is not None:
        for name, store in zip(("key", "value"), planned.stores, strict=True):
            tensors |= {f"{name}.{part}": tensor for part, tensor in store.named_tensors()}
        if planned.is_initialized:
            fact = {"batch": planned.batch, "repeats": planned.repeats, "tokens": planned.get_seq_length()}
    elif isinstance(layer, DynamicLayer):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and not _is_linear(layer):
            raise CacheError(f"layer {index} is a {type(layer).__name__}, which kvprof cannot save.")
        if layer.is_initialized:
            tensors = {"keys": layer.keys, "values": layer.values}
            fact = {"tokens": layer.get_seq_length()}
    if _is_linear(layer):
        for name, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
            tensors |= {f"{name}.{number}": state for number, state in states.items() if state is not None}
        fact["seen"] = [number for number, seen in layer.has_previous_state.items() if seen]
        fact["kernels"] = list(layer.conv_kernel_size.items())
    return tensors, fact


def _give(layer: Any, tensors: dict[str, Tensor], fact: dict[str, Any], model: PreTrainedModel) -> None:
    """Put into an empty layer what `_take` took out of a full one."""
    if _is_linear(layer):
        _give_states(layer, tensors, fact, model)
    planned = planned_layer(layer)
    if planned is not None:
        _give_planned(planned, tensors, fact, model)
    elif isinstance(layer, DynamicLayer) and "tokens" in fact:
        keys, values = (tensors[name].to(model.device) for name in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = int(fact["tokens"])


def _give_planned(
    planned: PlannedLayer, tensors: dict[str, Tensor], fact: dict[str, Any], model: PreTrainedModel
) -> None:
    if "tokens" not in fact:
        return
    planned.dtype, planned.device = model.dtype, torch.device("cpu")  # moved when the first token comes
    planned.batch, planned.repeats = int(fact["batch"]), int(fact["repeats"])
    for name, store in zip(("key", "value"), planned.stores, strict=True):
        parts = {part: tensor for part, tensor in tensors.items() if part.startswith(f"{name}.")}
        store.restore(
            {part.removeprefix(f"{name}."): tensor for part, tensor in parts.items()}, planned.batch, model.dtype
        )
        if store.tokens != fact["tokens"]:
            raise ValueError(f"the {name}s are {store.tokens} tokens, expected {fact['tokens']}")
    planned.is_initialized = True


def _give_states(layer: Any, tensors: dict[str, Tensor], fact: dict[str, Any], model: PreTrainedModel) -> None:
    kernels = dict(fact["kernels"])
    for number in range(layer.number_of_states):
        if f"conv.{number}" in tensors:
            state = tensors.pop(f"conv.{number}").to(model.device)
            layer.lazy_initialization(conv_states=state, state_idx=number, conv_kernel_size=kernels[number])
            layer.conv_states[number] = state
        if f"recurrent.{number}" in tensors:
            state = tensors.pop(f"recurrent.{number}").to(model.device)
            layer.lazy_initialization(recurrent_states=state, state_idx=number)
            layer.recurrent_states[number] = state
        layer.has_previous_state[number] = number in fact["seen"]


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)
