"""Families whose forward spells its attention out, past transformers' attention interface: how each can be asked.

Bloom, CodeGen, Falcon, GPT-J and MPT. For the length of a `with`, someone else answers in the place of the lines that
attend; everything around them stays the module's own. Does not know who answers, nor why.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

Answer = Callable[..., Tensor]
"""Called as (own attention, query, key, value, mask, options); returns (B, T, query heads, D)."""


def spelt_out(model: nn.Module) -> dict[int, nn.Module]:
    """Return a model's attention modules that spell their attention out in a way known here, by layer.

    In a newer transformers one of these families may go through the attention interface (GPT-J and CodeGen since 5.24).
    """
    return {
        module.layer_idx: module  # type: ignore[misc]
        for module in model.modules()
        if type(module).__qualname__ in _WAYS
        and not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    }


@contextlib.contextmanager
def answering(module: nn.Module, answer: Answer) -> Iterator[None]:
    """Let `answer` attend for a module of `spelt_out`. Of two such `with`s, the inner one counts."""
    name, make = _WAYS[type(module).__qualname__]
    if name == "forward" and "_old_forward" in module.__dict__:  # accelerate's hooks stay around it
        name = "_old_forward"
    own = module.__dict__.get(name)
    setattr(module, name, make(module, answer))
    try:
        yield
    finally:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)


def _method(module: Any, answer: Answer) -> Callable[..., tuple[Tensor, None]]:
    """GPT-J, CodeGen: a method of its own attends, and gives back (B, heads, T, D)."""

    def own(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **__: Any) -> tuple[Tensor, None]:
        return type(module)._attn(module, query, key, value, mask)[0].transpose(1, 2), None

    def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        return answer(own, query, key, value, attention_mask, {}).transpose(1, 2), None

    return attend


def _torchs_function(module: nn.Module, answer: Answer) -> Callable[..., Any]:
    """Falcon: its forward calls scaled_dot_product_attention, once; alibi is in the mask."""

    def forward(*arguments: Any, **options: Any) -> Any:
        with _Instead(answer):
            return type(module).forward(module, *arguments, **options)

    return forward


class _Instead(TorchFunctionMode):
    """Answers calls of scaled_dot_product_attention."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any other function of torch as it is."""
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args
        causal = {"is_causal": kwargs["is_causal"]}
        return self.answer(_sdpa, query, key, value, kwargs["attn_mask"], causal).transpose(1, 2)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool = False
) -> tuple[Tensor, None]:
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal and mask is None)
    return output.transpose(1, 2), None


def _bloom(module: Any, answer: Answer) -> Callable[..., tuple[Tensor, None]]:
    """Bloom: alibi is added to the scores, beside the mask."""

    def forward(
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        bias = alibi.reshape(len(query), module.num_heads, 1, -1)
        mask = _closed(bias, attention_mask, query.shape[2])
        output = answer(functools.partial(_softmax, module.inv_norm_factor), query, key, value, mask, {})
        output = module.dense(output.flatten(2))
        return residual + dropout(output, module.hidden_dropout, module.training), None

    return forward


def _mpt(module: Any, answer: Answer) -> Callable[..., tuple[Tensor, None]]:
    """MPT: alibi is added to the scores; the mask says what is closed."""

    def forward(
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        past = past_key_values if cache is None else cache  # its name since transformers 5.24
        mixed = module.Wqkv(hidden_states)
        if module.clip_qkv:
            mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        query, key, value = (
            part.unflatten(-1, (module.n_heads, module.head_dim)).transpose(1, 2) for part in mixed.chunk(3, dim=2)
        )
        if past is not None:
            key, value = past.update(key, value, module.layer_idx)
        bias = position_bias[None, :, :, -key.shape[2] :].to(query.dtype)
        opened = None if attention_mask is None else ~attention_mask
        mask = _closed(bias, opened, query.shape[2])
        output = answer(functools.partial(_softmax, module.softmax_scale), query, key, value, mask, {})
        return module.out_proj(output.flatten(2)), None

    return forward


def _closed(bias: Tensor, mask: Tensor | None, queries: int) -> Tensor:
    """Return what is added to the scores, (B or 1, heads, T, T): a bias, and a mask of numbers or of what is open."""
    least = torch.finfo(bias.dtype).min
    if mask is None:
        tokens = bias.shape[-1]
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=bias.device).tril(tokens - queries)
    opened = mask if mask.dtype == torch.bool else mask > least / 2
    return torch.where(opened, bias, least)


def _softmax(
    scaling: float, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Attend as Bloom and MPT do."""
    scores = query @ key.transpose(-1, -2) * scaling + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


_WAYS: dict[str, tuple[str, Callable[[nn.Module, Answer], Callable[..., Any]]]] = {
    "BloomAttention": ("forward", _bloom),
    "CodeGenAttention": ("_attn", _method),
    "FalconAttention": ("forward", _torchs_function),
    "GPTJAttention": ("_attn", _method),
    "MptAttention": ("forward", _mpt),
}
"""For each class of attention in transformers: what of it is answered for, and what makes the answer."""
