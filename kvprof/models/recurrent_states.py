"""The recurrent states of a model's layers: how many numbers each keeps of one sequence, whatever its length.

Runs the module tree on the meta device, without storage, and reads the shapes that the layers leave in transformers'
own cache: so any architecture is covered that transformers can run there, and no table of them is kept.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kvprof.models.quiet import quiet
from kvprof.records.geometry import RecurrentState

TOKENS = 9
"""Of the run: more than one, as a prompt has, and more than most convolutions reach back."""
_CACHES = ("cache", "past_key_values", "cache_params")
"""What a model's forward calls its cache."""


def recurrent_states(model: PreTrainedModel, config: PretrainedConfig) -> dict[int, RecurrentState]:
    """Return the recurrent state of each layer that leaves one in its cache; none where the model cannot be run so.

    model: on the meta device; its floating-point parameters are bfloat16 afterwards. config: of its text decoder.
    """
    cache = DynamicCache(config=config)
    layers = {number: layer for number, layer in enumerate(cache.layers) if _has_state(layer)}
    named = inspect.signature(model.forward).parameters
    word = next((name for name in _CACHES if name in named), None)
    if not layers or word is None:
        return {}
    # In 16 bits: a state that is float32 all the same is so in every dtype of the model.
    tokens = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    try:
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # the plain one asks which experts were chosen
        with quiet(), torch.no_grad():
            model.to(torch.bfloat16)(input_ids=tokens, use_cache=True, **{word: cache})
    except Exception:  # of a model's own code, where shapes alone do not tell what comes next
        return {}
    return {number: state for number, layer in layers.items() if (state := _state(layer)) is not None}


def _has_state(layer: object) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def state_tensors(layer: LinearAttentionCacheLayerMixin) -> list[Tensor]:
    """Return what a layer of transformers' cache keeps beside keys and values."""
    return [x for states in (layer.conv_states, layer.recurrent_states) for x in states.values() if x is not None]


def _state(layer: LinearAttentionCacheLayerMixin) -> RecurrentState | None:
    numbers = {True: 0, False: 0}
    for tensor in state_tensors(layer):
        numbers[tensor.dtype == torch.float32] += tensor.numel()
    return RecurrentState(elements=numbers[False], float32_elements=numbers[True]) if any(numbers.values()) else None
