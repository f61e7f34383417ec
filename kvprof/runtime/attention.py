"""What a decoding query reads from the cache that obeys a plan: for all queries of a text, in one forward.

Reads a plan; puts itself between a transformers model and its attention for the length of a `with`. Does not know how
codes are stored, nor what is measured on the logits.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from kvprof.errors import KvprofError, Mismatch, UnsupportedAttention
from kvprof.records.formats import TensorName
from kvprof.records.plan import BitPlan, LayerPlan, TensorPlan, Window, head_dim_of, quantized_tokens
from kvprof.runtime.quantizer import fake_quantize

NAME = "kvprof_decoding_reads"
"""What transformers calls this way to attend."""

QUERIES_AT_ONCE = 256
"""Queries whose scores are held at a time; their exact and restored keys overlap over about as many tokens."""


@contextlib.contextmanager
def decoding_reads(model: PreTrainedModel, plan: BitPlan) -> Iterator[None]:
    """Let a model's forwards attend as token-by-token decoding through the plan's cache does.

        with decoding_reads(model, plan):
            logits = model(input_ids).logits

    The query at position t reads the cache's state after t tokens, and its own key and value in full precision. Layers
    that the plan does not cover attend as the model does; one that shares a planned layer's keys reads what it reads.

    Each forward is a whole text from position 0. A batch may be padded on the right; padding on the left would be taken
    for the first tokens. A gradient passes straight through the rounding; take it inside the `with`.

    Raises UnsupportedAttention for a model whose attention cannot be replaced, at once or at the end of the first
    forward; Mismatch for a plan of another model; KvprofError for a forward that goes on from a cache.
    """
    decoders = _decoders(model)
    configs = {id(decoder.config): decoder.config for decoder in decoders}
    _check_fits(model, plan)
    before = [(config, config._attn_implementation, _active.get(key)) for key, config in configs.items()]
    _, name, outer = before[0]
    reads = _Reads(model, plan, name if outer is None else outer.own)
    hooks = [decoder.register_forward_hook(reads.check_complete) for decoder in decoders]
    try:
        for key, config in configs.items():
            _active[key] = reads
            config._attn_implementation = {"": NAME}  # a dict leaves the configs inside this one alone
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for config, name, outer in before:
            config._attn_implementation = {"": name}
            if outer is None:
                del _active[id(config)]
            else:
                _active[id(config)] = outer


class _Reads:
    """One `with`: its plan, the model's own way to attend, and which planned layers have attended."""

    def __init__(self, model: PreTrainedModel, plan: BitPlan, own: str) -> None:
        self.model_name = type(model).__name__
        self.plan = plan
        self.layers = {entry.layer: entry for entry in plan.layers}
        # Only these two take the mask that says which copy of a key a query reads.
        fallback = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
        self.own = own if own in ("eager", "sdpa") else fallback
        self._keys: dict[int, weakref.ref[Tensor]] = {}

    def layer_of(self, module: nn.Module, key_BHTD: Tensor) -> LayerPlan | None:
        """Return the plan of the layer that made these keys, or None where it has none."""
        layer = getattr(module, "layer_idx", None)
        if layer in self.layers:
            self._keys[layer] = weakref.ref(key_BHTD)
            return self.layers[layer]
        # A layer that shares keys is given the very tensor that another layer attended with.
        return next((self.layers[source] for source, made in self._keys.items() if made() is key_BHTD), None)

    def check_complete(self, decoder: nn.Module, *_: Any) -> None:
        """Raise UnsupportedAttention where a forward of the decoder ends in which a planned layer never attended."""
        missing = [layer for layer in self.layers if layer not in self._keys]
        if missing and _active[id(decoder.config)] is self:  # within another `with` it is that one's layers that attend
            raise UnsupportedAttention(
                f"layer {missing[0]} of {self.model_name} attends in a way of its own, which kvprof cannot replace."
            )


_active: dict[int, _Reads] = {}
"""The innermost `with`, by the id of the config that a model's attention modules hold. One thread a model: the config,
which says how to attend, is shared by all."""


@dataclass(frozen=True)
class _Copies:
    """A layer's keys or values: exact, as the cache gives them back, and how many of the latter each query reads.

    exact: (B, H, T, D). restored: (B, H, N, D), the first N tokens after the sinks. counts: T numbers up to N,
    ascending.
    """

    exact: Tensor
    restored: Tensor
    counts: tuple[int, ...]
    sinks: int

    def cut(self, start: int, stop: int, restored: bool) -> Tensor:
        """Return the copy of tokens start to stop, (B, H, stop - start, D)."""
        if restored:
            return self.restored[:, :, start - self.sinks : stop - self.sinks]
        return self.exact[:, :, start:stop]


@dataclass(frozen=True)
class _Piece:
    """A run of tokens in one copy of their keys and one of their values, for a chunk of queries."""

    start: int
    stop: int
    key_restored: bool
    value_restored: bool
    for_all: bool
    """Whether every query of the chunk reads this copy."""


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as the module would by itself, each query to its own mixture of exact and restored keys and values.

    query, key, value: (B, query or KV heads, T, D). attention_mask: (B, 1, T, T), added to the scores.
    Returns (B, T, query heads, D), and the weights only where a layer is left alone.
    """
    reads = _active[id(module.config)]
    own = _own_attention(module, reads)
    plan = reads.layer_of(module, key)
    if plan is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    tokens = key.shape[2]
    if query.shape[2] != tokens:
        raise KvprofError(
            f"decoding_reads needs a whole text in each forward: {query.shape[2]} queries came with {tokens} keys.\n"
            "  Give it no cache that already holds tokens."
        )
    if any(name.endswith("indices") and given is not None for name, given in kwargs.items()):
        raise UnsupportedAttention(f"{reads.model_name} reads a selection of its keys only (sparse attention).")
    keys = _copies(reads.plan, plan.layer, "key", plan.key, key)
    values = _copies(reads.plan, plan.layer, "value", plan.value, value)
    if keys.counts[-1] == values.counts[-1] == 0:
        return own(module, query, key, value, attention_mask, **kwargs)
    mask = _additive(attention_mask, tokens, query)
    bias = kwargs.pop("position_bias", None)
    outputs = []
    for first in range(0, tokens, QUERIES_AT_ONCE):
        queries = slice(first, min(tokens, first + QUERIES_AT_ONCE))
        pieces = _pieces(keys.counts[queries], values.counts[queries], keys.sinks, queries.stop)
        if bias is not None:
            kwargs["position_bias"] = _joined(bias[:, :, queries, piece.start : piece.stop] for piece in pieces)
        output, _ = own(
            module,
            query[:, :, queries],
            _joined((keys.cut(piece.start, piece.stop, piece.key_restored) for piece in pieces), 2),
            _joined((values.cut(piece.start, piece.stop, piece.value_restored) for piece in pieces), 2),
            _joined(_masked(mask, piece, keys, values, queries) for piece in pieces),
            **kwargs,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


# The mask always comes as numbers, also where the model's own attention would be content with "causal".
AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)


def _decoders(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the modules that are a text decoder, with or without its head; raise UnsupportedAttention."""
    # Told by its config's class: the text config may have been copied on its way into the decoder.
    kind = type(model.config.get_text_config(decoder=True))
    decoders = [part for part in model.modules() if isinstance(part, PreTrainedModel) and type(part.config) is kind]
    if not decoders or not all(decoder._can_set_attn_implementation() for decoder in decoders):
        raise UnsupportedAttention(
            f"{type(model).__name__} attends in a way of its own, which kvprof cannot replace: it does not go through "
            "transformers' attention interface."
        )
    return decoders


def _check_fits(model: PreTrainedModel, plan: BitPlan) -> None:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if plan.model.num_layers != layers:
        raise Mismatch(
            f"the plan is for another model ({plan.model.id or 'unnamed'}): it has {plan.model.num_layers} layers, "
            f"{type(model).__name__} {layers}."
        )


def _own_attention(module: nn.Module, reads: _Reads) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the function that the module would call, taken from the file that defines it, as the module does."""
    for kind in type(module).__mro__:
        names = vars(sys.modules[kind.__module__])
        if "ALL_ATTENTION_FUNCTIONS" in names and (reads.own != "eager" or "eager_attention_forward" in names):
            own: Callable[..., tuple[Tensor, Tensor | None]] = names["ALL_ATTENTION_FUNCTIONS"].get_interface(
                reads.own, names.get("eager_attention_forward")
            )
            return own
    raise UnsupportedAttention(f"{reads.model_name}: {type(module).__name__} names no attention function of its own.")


def _copies(plan: BitPlan, layer: int, name: TensorName, form: TensorPlan, exact_BHTD: Tensor) -> _Copies:
    """Quantize every token that some query reads quantized; what a token becomes depends on no query."""
    head_dim = exact_BHTD.shape[3]
    planned = form.group_size if form.scheme == "rotated" else head_dim
    if plan.geometry is not None:
        planned = head_dim_of(plan.geometry.layers[layer], name)
    if planned != head_dim:
        raise Mismatch(f"layer {layer} attends with {name} heads of {head_dim} channels, the plan says {planned}.")
    counts = _counts(form, plan.window, exact_BHTD.shape[2])
    sinks = plan.window.sink_tokens
    exact = exact_BHTD[:, :, sinks : sinks + counts[-1]]
    restored = fake_quantize(exact.detach(), form, plan.quantizer) if counts[-1] else exact
    if counts[-1] and exact.requires_grad:
        restored = restored + (exact - exact.detach())  # adds zero, and a gradient of one: straight through
    return _Copies(exact_BHTD, restored, counts, sinks)


@functools.lru_cache(maxsize=64)
def _counts(form: TensorPlan, window: Window, tokens: int) -> tuple[int, ...]:
    """Return how many tokens are held as codes when the query at each position arrives: after none, one, two ..."""
    return tuple(quantized_tokens(form, window, before, form.recent_fraction) for before in range(tokens))


@functools.lru_cache(maxsize=256)
def _pieces(key_counts: tuple[int, ...], value_counts: tuple[int, ...], sinks: int, tokens: int) -> tuple[_Piece, ...]:
    """Cut the tokens that a chunk of queries reads so that each query finds each token in one piece and one copy.

    key_counts, value_counts: of the chunk's queries. As queries go on, a token turns from exact to restored; where that
    happens within the chunk, the token is in several pieces.
    """
    turns = sorted({0, key_counts[0], key_counts[-1], value_counts[0], value_counts[-1], tokens - sinks})
    pieces = [_Piece(0, min(sinks, tokens), key_restored=False, value_restored=False, for_all=True)]
    for start, stop in itertools.pairwise(turn for turn in turns if turn >= 0):
        read = set()
        for keys, values in zip(key_counts, value_counts, strict=True):
            copies = {  # (of the key, of the value), and the tokens that this query reads so
                (True, True): (start, min(keys, values, stop)),
                (True, False): (max(start, values), min(keys, stop)),
                (False, True): (max(start, keys), min(values, stop)),
                (False, False): (max(start, keys, values), stop),
            }
            read |= {copy for copy, (first, last) in copies.items() if first < last}
        pieces += [_Piece(sinks + start, sinks + stop, *copy, for_all=len(read) == 1) for copy in sorted(read)]
    return tuple(piece for piece in pieces if piece.start < piece.stop)


def _masked(mask: Tensor, piece: _Piece, keys: _Copies, values: _Copies, queries: slice) -> Tensor:
    """Return the mask of a chunk's queries over one piece, closed to those that read another copy of it."""
    own = mask[:, :, queries, piece.start : piece.stop]
    if piece.for_all:
        return own
    tokens = torch.arange(piece.start - keys.sinks, piece.stop - keys.sinks, device=mask.device)
    key_restored, value_restored = (
        tokens < torch.tensor(copies.counts[queries], device=mask.device)[:, None] for copies in (keys, values)
    )
    read = (key_restored == piece.key_restored) & (value_restored == piece.value_restored)
    return own.masked_fill(~read, torch.finfo(own.dtype).min)


def _additive(mask: Tensor | None, tokens: int, query: Tensor) -> Tensor:
    """Return the mask as numbers to add to scores, (B or 1, heads or 1, T, T)."""
    if mask is None:
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


def _joined(parts: Iterable[Tensor], dim: int = 3) -> Tensor:
    found = list(parts)
    return found[0] if len(found) == 1 else torch.cat(found, dim)
