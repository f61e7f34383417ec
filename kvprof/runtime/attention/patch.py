"""Between a transformers model and its attention: for the length of a `with`, chosen layers attend as a caller says.

Reads a model's config and modules, and leaves them as found. Does not know plans, codes, nor why anyone asks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from kvprof.errors import Mismatch, UnsupportedAttention
from kvprof.models.decoder import decoder_parts, text_config
from kvprof.runtime.attention.inline_attention import answering, spelt_out

NAME = "kvprof_interception"
"""What transformers calls this way to attend."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Latents:
    """What latent attention (MLA) caches, and makes keys and values of.

    module: the attention. latent: (B, 1, T, rank). rope: the rotary part of all heads' keys, (B, 1, T, D_rope).
    """

    module: nn.Module
    latent: Tensor
    rope: Tensor

    def expand(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the module makes of some latents, (B, heads, T, D) each."""
        kind: Any = type(self.module)
        made: tuple[Tensor, Tensor] = kind.expand_kv(self.module, latent, rope)
        return made

    def promoted(self, dtype: torch.dtype) -> Latents:
        """Return latents that are expanded in a wider dtype; raise UnsupportedAttention for weights not at hand."""
        up: Any = self.module.kv_b_proj
        if type(up) is not nn.Linear or up.weight.is_meta:
            raise UnsupportedAttention(
                f"{type(self.module).__name__} makes its keys of a latent by a {type(up).__name__} that cannot be "
                f"widened to {str(dtype).removeprefix('torch.')}."
            )
        wide = copy.copy(self.module)
        wide._modules = {**self.module._modules, "kv_b_proj": copy.deepcopy(up).to(dtype)}
        return Latents(wide, self.latent.to(dtype), self.rope.to(dtype))


@dataclass(frozen=True)
class AttentionCall:
    """A layer that attends: what it was given, and the function that it would call by itself.

    layer: whose keys and values these are; another one where a layer shares them. query, key, value: (B, query or KV
    heads, T, D). mask: (B or 1, 1, T, T), added to the scores, or None. options: what else the function takes. latents:
    what keys and values were made of, where the layer caches that in their place.
    """

    layer: int
    model_name: str
    module: nn.Module
    attention: Attention
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]
    latents: Latents | None = None

    @property
    def cached(self) -> tuple[Tensor, Tensor]:
        """What the cache holds of the layer: keys and values, or the latents in their place."""
        return (self.key, self.value) if self.latents is None else (self.latents.latent, self.latents.rope)

    def detached(self) -> AttentionCall:
        """Return the call with tensors that no gradient passes through."""
        states = {name: getattr(self, name).detach() for name in ("query", "key", "value")}
        if self.latents is not None:
            latent, rope = (states.detach() for states in self.cached)
            states["latents"] = replace(self.latents, latent=latent, rope=rope)
        return replace(self, **states)

    def run(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attend as the module does, with what is given here in the place of its own: (B, T, query heads, D)."""
        output, _ = self.attention(
            self.module,
            self.query if query is None else query,
            self.key if key is None else key,
            self.value if value is None else value,
            self.mask if mask is None else mask,
            **{**self.options, **options},
        )
        return output

    def promoted(self, dtype: torch.dtype) -> AttentionCall:
        """Return the call with all its floating-point tensors in a dtype."""

        def wide(given: Any) -> Any:
            return given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given

        states = {name: wide(getattr(self, name)) for name in ("query", "key", "value", "mask")}
        latents = None
        if self.latents is not None:
            latents = self.latents.promoted(dtype)
            states["key"], states["value"] = latents.expand(latents.latent, latents.rope)
        options = {name: wide(given) for name, given in self.options.items()}
        return replace(self, **states, options=options, latents=latents)


@contextlib.contextmanager
def attention_through(
    model: PreTrainedModel, layers: Collection[int], attend: Callable[[AttentionCall], Tensor]
) -> Iterator[None]:
    """Let `attend` answer, with (B, T, query heads, D), whenever one of these layers' keys are attended to.

    The other layers attend as the model does. Of two such `with`s on one model, the inner one counts.
    Raises UnsupportedAttention for a model whose attention cannot be replaced, at once or at the end of the first
    forward.
    """
    if modules := spelt_out(model):
        with _answered(model, modules, layers, attend):
            yield
        return
    decoders = text_decoders(model)
    configs = {id(decoder.config): decoder.config for decoder in decoders}
    latent = {module for decoder in decoders for module in decoder.modules() if hasattr(module, "expand_kv")}
    before = [(config, config._attn_implementation, _active.get(key)) for key, config in configs.items()]
    _, name, outer = before[0]
    here = _Interception(model, layers, attend, name if outer is None else outer.own)
    hooks = [decoder.register_forward_hook(here.check_complete) for decoder in decoders]
    try:
        for module in latent:
            module.expand_kv = functools.partial(here.expand, module)
        for key, config in configs.items():
            _active[key] = here
            config._attn_implementation = {"": NAME}  # a dict leaves the configs inside this one alone
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in latent:
            if outer is None:
                module.__dict__.pop("expand_kv", None)
            else:
                module.expand_kv = functools.partial(outer.expand, module)
        for config, name, outer in before:
            config._attn_implementation = {"": name}
            if outer is None:
                del _active[id(config)]
            else:
                _active[id(config)] = outer


@contextlib.contextmanager
def _answered(
    model: PreTrainedModel,
    modules: Mapping[int, nn.Module],
    layers: Collection[int],
    attend: Callable[[AttentionCall], Tensor],
) -> Iterator[None]:
    """Do as `attention_through` does, for a model that spells its attention out. modules: its attention, by layer."""

    def answer(layer: int, module: nn.Module, own: Attention, *states: Any) -> Tensor:
        return attend(AttentionCall(layer, type(model).__name__, module, own, *states))

    config, before = model.config, model.config._attn_implementation
    with contextlib.ExitStack() as stack:
        for layer in sorted(layers):
            module = modules[layer]
            stack.enter_context(answering(module, functools.partial(answer, layer, module)))
        try:
            if model._supports_sdpa:  # where it is torch's function that is answered for
                config._attn_implementation = {"": "sdpa"}
            yield
        finally:
            config._attn_implementation = {"": before}


def check_layers(model: PreTrainedModel, what: str, name: str | None, num_layers: int) -> None:
    """Raise Mismatch where a file (`what`), of a model of this name, has another number of layers than this model."""
    layers = text_config(model.config).num_hidden_layers
    if num_layers != layers:
        raise Mismatch(
            f"the {what} is for another model ({name or 'unnamed'}): it has {num_layers} layers, "
            f"{type(model).__name__} {layers}."
        )


class _Interception:
    """One `with`: who attends, the model's own way to attend, and which layers have attended."""

    def __init__(
        self, model: PreTrainedModel, layers: Collection[int], attend: Callable[[AttentionCall], Tensor], own: str
    ) -> None:
        self.model_name = type(model).__name__
        self.layers = frozenset(layers)
        self.attend = attend
        # Only these two take any mask.
        fallback = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
        self.own = own if own in ("eager", "sdpa") else fallback
        self._keys: dict[int, weakref.ref[Tensor]] = {}
        self._latents: dict[nn.Module, Latents] = {}

    def expand(self, module: nn.Module, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Make keys and values of latents as the module does; keep these for its attention, which comes next."""
        self._latents[module] = Latents(module, latent, rope)
        return self._latents[module].expand(latent, rope)

    def latents_of(self, module: nn.Module) -> Latents | None:
        """Return what a module has just made its keys of, once; None where it made them of no latents."""
        return self._latents.pop(module, None)

    def layer_of(self, module: nn.Module, key_BHTD: Tensor) -> int | None:
        """Return which of the layers made these keys, or latents, or None where none did."""
        layer = getattr(module, "layer_idx", None)
        if layer in self.layers:
            self._keys[layer] = weakref.ref(key_BHTD)
            return int(layer)
        # A layer that shares keys is given the very tensor that another layer attended with.
        return next((source for source, made in self._keys.items() if made() is key_BHTD), None)

    def check_complete(self, decoder: nn.Module, *_: Any) -> None:
        """Raise UnsupportedAttention where a forward of the decoder ends in which one of the layers never attended."""
        missing = sorted(self.layers - set(self._keys))
        if missing and _active[id(decoder.config)] is self:  # within another `with` it is that one's layers that attend
            raise UnsupportedAttention(
                f"layer {missing[0]} of {self.model_name} attends in a way of its own, which kvprof cannot replace."
            )


_active: dict[int, _Interception] = {}
"""The innermost `with`, by the id of the config that a model's attention modules hold. One thread a model: the config,
which says how to attend, is shared by all."""


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as the module would by itself, or as the caller says. Returns weights only where a layer is left alone."""
    here = _active[id(module.config)]
    own = own_attention(module, here.own)
    latents = here.latents_of(module)
    layer = here.layer_of(module, key if latents is None else latents.latent)
    if latents is not None and (selected := kwargs.pop("indices", None)) is not None:
        attention_mask = _closed_but(selected, attention_mask, key)  # as the module does for attention that it knows
    if layer is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    if any(name.endswith("indices") and given is not None for name, given in kwargs.items()):
        raise UnsupportedAttention(f"{here.model_name} reads a selection of its keys only (sparse attention).")
    call = AttentionCall(layer, here.model_name, module, own, query, key, value, attention_mask, kwargs, latents)
    return here.attend(call), None


def _closed_but(selected: Tensor, mask: Tensor | None, key_BHTD: Tensor) -> Tensor:
    """Return the mask closed to all keys but those that an indexer selected for each query. selected: (B, T, k)."""
    keys = key_BHTD.shape[2]
    closed = torch.ones(*selected.shape[:2], keys, dtype=torch.bool, device=selected.device)
    closed = closed.scatter(-1, selected.long(), False)[:, None]  # (B, 1, T, keys)
    open_ = torch.zeros(1, dtype=key_BHTD.dtype, device=closed.device) if mask is None else mask
    return open_.masked_fill(closed, torch.finfo(key_BHTD.dtype).min)


# The mask always comes as numbers, also where the model's own attention would be content with "causal".
AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)


def text_decoders(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the modules that are a text decoder, with or without its head; raise UnsupportedAttention."""
    decoders = [part for _, part in decoder_parts(model)]
    if not decoders or not all(decoder._can_set_attn_implementation() for decoder in decoders):
        raise UnsupportedAttention(
            f"{type(model).__name__} attends in a way of its own, which kvprof cannot replace: it does not go through "
            "transformers' attention interface."
        )
    return decoders


def own_attention(module: nn.Module, name: str) -> Attention:
    """Return the function of a name (`eager`, `sdpa`) that a module would call, as the file that defines it has it."""
    for kind in type(module).__mro__:
        names = vars(sys.modules[kind.__module__])
        if "ALL_ATTENTION_FUNCTIONS" in names and (name != "eager" or "eager_attention_forward" in names):
            own: Attention = names["ALL_ATTENTION_FUNCTIONS"].get_interface(name, names.get("eager_attention_forward"))
            return own
    raise UnsupportedAttention(f"{type(module).__name__} names no attention function of its own.")
