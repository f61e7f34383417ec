"""How a model's attention reads a PlanCache's codes where they lie, instead of unpacked tensors.

Registers kvprof's attention, and its mask, with transformers; decides at each call who attends. Changes nothing of a
model but the name of its attention. Does not know plans, nor how codes are stored.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from kvprof.errors import UnsupportedAttention, first_line
from kvprof.runtime.attention.patch import own_attention, text_decoders
from kvprof.runtime.history import History
from kvprof.runtime.kernels.dispatch import Kernels
from kvprof.runtime.kernels.torch_kernels import say_once

NAMES = {"sdpa": "kvprof", "eager": "kvprof_eager"}
"""What transformers calls the attention, by what it leaves other queries to: a prompt's, or those of another cache."""

HARMLESS = frozenset(
    {"cache_position", "is_causal", "position_ids", "scaling", "sliding_window", "softcap", "use_cache"}
)  # fmt: skip
"""Options of an attention function that the kernels obey, or that say nothing which the mask does not say."""


class Packed:
    """What a token's keys and values stand for: a history as it is packed, and what is made of it where one must."""

    def __init__(self, kernels: Kernels, history: History, unpack: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.kernels = kernels
        self.history = history
        self.unpack = functools.cache(unpack)

    def hand_over(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the token's own keys and values, (B, H, 1, D) each, as what stands for all."""
        tokens = (key_states.as_subclass(NewestToken), value_states.as_subclass(NewestToken))
        for place, token in enumerate(tokens):
            token.packed, token.place = self, place
        return tokens


class NewestToken(Tensor):
    """One token's keys or values, which stand for a whole history.

    kvprof's attention reads that as it is packed. To whoever else looks at the tensor, were it only at its shape, it is
    the unpacked history: a model may work on its keys before it attends, or attend in a way of its own.
    """

    packed: Packed
    place: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any function of torch on the unpacked history."""
        say_once("a model works itself on the keys or values that it attends to: they are unpacked for it")
        args, kwargs = tree_map_only(
            NewestToken, lambda token: token.packed.unpack()[token.place], (args, kwargs or {})
        )
        return func(*args, **kwargs)


class Hook:
    """A model's word on whether kvprof attends for it just now. A pickled one has no model, and says no."""

    def __init__(self, kernels: Kernels, config: PretrainedConfig | None = None) -> None:
        self.kernels = kernels
        self._config = None if config is None else weakref.ref(config)

    def attends(self) -> bool:
        """Whether the attention that comes next is kvprof's."""
        config = None if self._config is None else self._config()
        return config is not None and config._attn_implementation in NAMES.values()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self  # of the same model

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (self.kernels,)


def hook(model: PreTrainedModel, kernels: Kernels) -> Hook | None:
    """Let a model attend through kvprof from now on.

    What is no PlanCache is attended to by SDPA; by the model's own plain attention where it was that before, or knows
    no SDPA. Says so, and returns None, where the model's attention cannot be replaced.
    """
    try:
        decoders = text_decoders(model)
        for decoder in decoders:
            if _asks_for_its_name(decoder):
                raise UnsupportedAttention("its code asks whether its attention is called `sdpa`.")
    except UnsupportedAttention as error:
        say_once(f"{type(model).__name__} attends to unpacked keys and values: {first_line(error)}")
        return None
    for decoder in decoders:
        before = decoder.config._attn_implementation
        plain = before in ("eager", NAMES["eager"]) or not getattr(model, "_supports_sdpa", False)
        if before not in ("sdpa", "eager", *NAMES.values()):
            say_once(f"{type(model).__name__} attends by {'eager' if plain else 'sdpa'} instead of {before}")
        decoder.set_attn_implementation(NAMES["eager" if plain else "sdpa"])
    return Hook(kernels, decoders[0].config)


def _asks_for_its_name(decoder: PreTrainedModel) -> bool:
    """Whether a model's code does one thing under `sdpa` and another under a name that it does not know."""
    source = inspect.getsource(sys.modules[type(decoder).__module__])
    return re.search(r"_attn_implementation[^\n]*(?:==|!=| in )[^\n]*[\"']sdpa", source) is not None


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
    if isinstance(key, NewestToken) and isinstance(value, NewestToken) and key.packed is value.packed:
        packed = key.packed
        reason = _why_not(packed, query, attention_mask, options)
        if reason is None:
            scaling = options.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = packed.kernels.attend(query, packed.history, scaling, attention_mask, options.get("softcap"))
            return output.transpose(1, 2).contiguous(), None
        say_once(f"a query attends to unpacked keys and values: {reason}")
        key, value = packed.unpack()
    return own_attention(module, own)(module, query, key, value, attention_mask, **options)


def _why_not(packed: Packed, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> str | None:
    """Return why the kernels do not attend here, or None where they do."""
    for name, given in options.items():
        if name not in HARMLESS and given is not None and given is not False and not (name == "dropout" and given == 0):
            return f"the model's attention takes {name}"
    if torch.is_grad_enabled() and query.requires_grad:
        return "a gradient is wanted; call the model under torch.inference_mode()"
    return packed.kernels.why_not(query, packed.history, mask)


for _own, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(NAMES[_own], functools.partial(_attend, _own))
    # Without a mask of its own, an attention that transformers does not know is given none: padding would be read.
    AttentionMaskInterface.register(NAMES[_own], _mask)
