"""How a model's attention reads a PlanCache's codes where they lie, instead of unpacked tensors.

Registers kvprof's attention, and its mask, with transformers; decides at each call who attends. Changes nothing of a
model but the name of its attention. Does not know plans, nor how codes are stored.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from kvprof.errors import UnsupportedAttention, first_line
from kvprof.runtime.history import History
from kvprof.runtime.interception import own_attention, text_decoders
from kvprof.runtime.kernels import Kernels, say_once

NAMES = {"sdpa": "kvprof", "eager": "kvprof_eager"}
"""What transformers calls the attention, by what it leaves other queries to: a prompt's, or those of another cache."""

HARMLESS = frozenset(
    {"cache_position", "is_causal", "output_attentions", "output_hidden_states", "position_ids", "scaling",
     "sliding_window", "softcap", "use_cache"}
)  # fmt: skip
"""Options of an attention function that the kernels obey, or that say nothing which the mask does not say."""

_HANDED = "_kvprof_handed"


@dataclass
class Packed:
    """What the newest token's keys and values stand for; unpack: makes what other attentions need."""

    history: History
    unpack: Callable[[], tuple[Tensor, Tensor]]


@dataclass
class Handed:
    """What a layer of a PlanCache gave its model besides keys and values; packed: None where these are all there is."""

    layer: HookedLayer
    packed: Packed | None = None

    def mark(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors, recognizable as these very ones."""
        marked = tuple(tensor.view_as(tensor) for tensor in tensors)
        for tensor in marked:
            setattr(tensor, _HANDED, self)
        return marked


class HookedLayer:
    """One layer's word on whether its model attends through kvprof.

    A layer gives nothing but plain tensors until an attention of kvprof's was seen to take the very ones that it gave:
    a model may change keys on their way, or attend in a way of its own.
    """

    def __init__(self, config: PretrainedConfig, kernels: Kernels) -> None:
        self._config = weakref.ref(config)
        self.kernels = kernels
        self.seen = False

    def takes_history(self) -> bool:
        """Whether the attention that comes next is kvprof's, and reads what it is handed."""
        config = self._config()
        return self.seen and config is not None and config._attn_implementation in NAMES.values()


def hook(model: PreTrainedModel, kernels: Kernels, shares_keys: bool) -> Callable[[], HookedLayer] | None:
    """Let a model attend through kvprof from now on; return what makes the word of one layer.

    shares_keys: whether some layers attend to another one's keys, which may not be the tensors that it was given.
    Says so, and returns None, where the model's attention cannot be replaced. Any other cache works as before.
    """
    try:
        if shares_keys:
            raise UnsupportedAttention("some of its layers read another layer's keys")
        decoders = text_decoders(model)
    except UnsupportedAttention as error:
        say_once(f"{type(model).__name__} attends to unpacked keys and values: {first_line(error)}")
        return None
    own = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    for decoder in decoders:
        decoder.set_attn_implementation(NAMES[own])
    return functools.partial(HookedLayer, decoders[0].config, kernels)


def _attend(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to a history as it is packed, or as the model does by itself. Returns (B, T, query heads, D)."""
    handed = getattr(key, _HANDED, None)
    same = handed is getattr(value, _HANDED, None)
    if isinstance(handed, Handed) and same:
        handed.layer.seen = True
        if handed.packed is not None:
            reason = _why_not(handed.layer.kernels, handed.packed.history, query, attention_mask, options)
            if reason is None:
                scaling = options.get("scaling")
                scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
                output = handed.layer.kernels.attend(
                    query, handed.packed.history, scaling, attention_mask, options.get("softcap")
                )
                return output.transpose(1, 2).contiguous(), None
            say_once(f"a query attends to unpacked keys and values: {reason}")
            key, value = handed.packed.unpack()
    return own_attention(module, own)(module, query, key, value, attention_mask, **options)


def _why_not(
    kernels: Kernels, history: History, query: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> str | None:
    """Return why the kernels do not attend here, or None where they do."""
    others = [name for name, given in options.items() if name not in HARMLESS and given is not None]
    others = [name for name in others if not (name == "dropout" and options[name] == 0.0)]
    if others:
        return f"the model's attention takes {others[0]}"
    if torch.is_grad_enabled() and query.requires_grad:
        return "a gradient is wanted; call the model under torch.inference_mode()"
    return kernels.why_not(query, history, mask)


for _own, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(NAMES[_own], functools.partial(_attend, _own))
    # Without a mask of its own, an attention that transformers does not know is given none: padding would be read.
    AttentionMaskInterface.register(NAMES[_own], _mask)
