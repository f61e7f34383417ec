"""What a decoding query reads from the cache that obeys a plan: for all queries of a text, in one forward.

Reads a plan, or the formats of one layer's keys and values; puts itself between a model and its attention for the
length of a `with`. Does not know how codes are stored, nor what is measured.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.errors import BeyondFormat, KvprofError, Mismatch
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.plan import AnyLayerPlan, BitPlan, Quantizer, TensorPlan, Window, head_dim_of, tokens_read_as_codes
from kvprof.runtime.attention.patch import AttentionCall, Latents, attention_through, check_layers
from kvprof.runtime.quantization.quantizer import fake_quantize

QUERIES_AT_ONCE = 256
"""Queries whose scores are held at a time; their exact and restored keys overlap over about as many tokens."""


@contextlib.contextmanager
def decoding_reads(model: PreTrainedModel, plan: BitPlan) -> Iterator[None]:
    """Let a model's forwards attend as token-by-token decoding through the plan's cache does.

        with decoding_reads(model, plan):
            logits = model(input_ids).logits

    The query at position t reads the cache's state after t tokens, and its own key and value in full precision; where
    the plan's window has the own token stored, the state after t + 1 tokens. Layers
    that the plan does not cover attend as the model does; one that shares a planned layer's keys reads what it reads.

    Each forward is a whole text from position 0. A batch may be padded on the right; padding on the left would be taken
    for the first tokens. A gradient passes straight through the rounding; take it inside the `with`.

    Raises UnsupportedAttention for a model whose attention cannot be replaced, at once or at the end of the first
    forward; Mismatch for a plan of another model; KvprofError for a forward that goes on from a cache.
    """
    check_layers(model, "plan", plan.model.id, plan.model.num_layers)
    layers = {entry.layer: entry for entry in plan.layers}

    def attend(call: AttentionCall) -> Tensor:
        entry = layers[call.layer]
        if plan.geometry is not None:
            _check_head_dims(call, entry, plan)
        return attend_as_decoding(call, entry.key, entry.value, plan.window, plan.quantizer)

    with attention_through(model, layers, attend):
        yield


def attend_as_decoding(
    call: AttentionCall,
    key: TensorPlan,
    value: TensorPlan,
    window: Window,
    quantizer: Quantizer,
    first: int = 0,
    wide: AttentionCall | None = None,
) -> Tensor:
    """Attend each query to its own mixture of exact and restored keys and values, as the module does otherwise.

    call: of a whole text. key, value: how what the cache holds is stored; of latents, these in their place. first: the
    queries before it are left out. wide: the call in a wider dtype, to attend in once keys and values are rounded and
    restored in their own; by default the same.
    Returns (B, T - first, query heads, D).
    """
    tokens = call.key.shape[2]
    if call.query.shape[2] != tokens:
        raise KvprofError(
            f"decoding_reads needs a whole text in each forward: {call.query.shape[2]} queries came with {tokens} "
            "keys.\n  Give it no cache that already holds tokens."
        )
    keys = _copies(call.layer, "key", key, window, quantizer, call.cached[0])
    values = _copies(call.layer, "value", value, window, quantizer, call.cached[1])
    if keys.counts[-1] == values.counts[-1] == 0 and first == 0 and wide is None:
        return call.run()
    if wide is not None:
        dtype = wide.query.dtype
        call, keys, values = wide, keys.promoted(dtype), values.promoted(dtype)
    expanded = None if call.latents is None else _Expanded(call, call.latents, keys, values)
    mask = additive_mask(call.mask, tokens, call.query)
    bias = call.options.get("position_bias")
    outputs = []
    for start in range(first, tokens, QUERIES_AT_ONCE):
        queries = slice(start, min(tokens, start + QUERIES_AT_ONCE))
        pieces = _pieces(keys.counts[queries], values.counts[queries], keys.sinks, queries.stop)
        options = chunk_options(call, queries)
        if bias is not None:
            options["position_bias"] = _joined(bias[:, :, queries, piece.start : piece.stop] for piece in pieces)
        read = [_read(piece, keys, values) if expanded is None else expanded.read(piece) for piece in pieces]
        output = call.run(
            call.query[:, :, queries],
            _joined((key_states for key_states, _ in read), 2),
            _joined((value_states for _, value_states in read), 2),
            _joined(_masked(mask, piece, keys, values, queries) for piece in pieces),
            **options,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def run_queries(call: AttentionCall, queries: slice) -> Tensor:
    """Attend some queries of a whole text to all before them, as the module does: (B, queries, heads, D)."""
    start, stop, _ = queries.indices(call.query.shape[2])
    queries = slice(start, stop)
    options = chunk_options(call, queries)
    if (bias := options.get("position_bias")) is not None:
        options["position_bias"] = bias[..., :stop]
    mask = additive_mask(call.mask, call.key.shape[2], call.query)[:, :, queries, :stop]
    return call.run(call.query[:, :, queries], call.key[:, :, :stop], call.value[:, :, :stop], mask, **options)


def chunk_options(call: AttentionCall, queries: slice) -> dict[str, Any]:
    """Return the options of a call that have a number for each query, (B, heads, T, ...), for some of the queries.

    Inkling's sinks are one, and its position bias, of all keys.
    """
    tokens = call.query.shape[2]
    return {
        name: given[:, :, queries]
        for name, given in call.options.items()
        if isinstance(given, Tensor) and given.dim() == 4 and given.shape[2] == tokens
    }


def _check_head_dims(call: AttentionCall, entry: AnyLayerPlan, plan: BitPlan) -> None:
    assert plan.geometry is not None
    shape = plan.geometry.layers[entry.layer]
    for name, exact in zip(TENSORS, call.cached, strict=True):
        _check_head_dim(entry.layer, name, head_dim_of(shape, name), exact)


def _check_head_dim(layer: int, name: TensorName, planned: int, exact_BHTD: Tensor) -> None:
    if planned != exact_BHTD.shape[3]:
        raise Mismatch(
            f"layer {layer} attends with {name} heads of {exact_BHTD.shape[3]} channels, the plan says {planned}."
        )


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

    def promoted(self, dtype: torch.dtype) -> _Copies:
        return replace(self, exact=self.exact.to(dtype), restored=self.restored.to(dtype))


@dataclass(frozen=True)
class _Piece:
    """A run of tokens in one copy of their keys and one of their values, for a chunk of queries."""

    start: int
    stop: int
    key_restored: bool
    value_restored: bool
    for_all: bool
    """Whether every query of the chunk reads this copy."""


def _read(piece: _Piece, keys: _Copies, values: _Copies) -> tuple[Tensor, Tensor]:
    """Return the keys and values that a piece has, (B, H, N, D) each."""
    return (
        keys.cut(piece.start, piece.stop, piece.key_restored),
        values.cut(piece.start, piece.stop, piece.value_restored),
    )


class _Expanded:
    """The keys and values that are made of each mixture of exact and restored latents, each mixture once."""

    def __init__(self, call: AttentionCall, latents: Latents, latent: _Copies, rope: _Copies) -> None:
        self._exact = call.key, call.value
        self._expand = latents.expand
        self._copies = latent, rope
        self._made: dict[tuple[bool, bool], tuple[Tensor, Tensor]] = {}

    def read(self, piece: _Piece) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a piece has, (B, H, N, D) each."""
        restored = piece.key_restored, piece.value_restored
        if restored == (False, False):
            key, value = (states[:, :, piece.start : piece.stop] for states in self._exact)
            return key, value
        latent, rope = self._copies
        if restored not in self._made:
            stop = latent.sinks + min(
                copies.restored.shape[2]
                for copies, is_restored in zip(self._copies, restored, strict=True)
                if is_restored
            )
            self._made[restored] = self._expand(
                latent.cut(latent.sinks, stop, restored[0]), rope.cut(rope.sinks, stop, restored[1])
            )
        place = slice(piece.start - latent.sinks, piece.stop - latent.sinks)
        key, value = (states[:, :, place] for states in self._made[restored])
        return key, value


def _copies(
    layer: int, name: TensorName, form: TensorPlan, window: Window, quantizer: Quantizer, exact_BHTD: Tensor
) -> _Copies:
    counts = tokens_in_codes(form, window, exact_BHTD.shape[2])
    sinks = window.sink_tokens
    exact = exact_BHTD[:, :, sinks : sinks + counts[-1]]
    restored = restored_tokens(layer, name, form, quantizer, exact)
    if counts[-1] and exact.requires_grad:
        restored = restored + (exact - exact.detach())  # adds zero, and a gradient of one: straight through
    return _Copies(exact_BHTD, restored, counts, sinks)


def restored_tokens(layer: int, name: TensorName, form: TensorPlan, quantizer: Quantizer, exact_BHND: Tensor) -> Tensor:
    """Return what the cache gives back of tokens that some query reads quantized: that depends on no query.

    exact_BHND: the tokens after the sinks, as many as the last query reads so; perhaps none.
    Raises Mismatch for heads that a rotation does not fit, BeyondFormat.
    """
    if form.scheme == "rotated":
        _check_head_dim(layer, name, form.group_size, exact_BHND)
    if not exact_BHND.shape[2]:
        return exact_BHND
    try:
        return fake_quantize(exact_BHND.detach(), form, quantizer)
    except BeyondFormat as error:
        raise BeyondFormat(f"the {name}s of layer {layer}: {error}") from None


@functools.lru_cache(maxsize=64)
def tokens_in_codes(form: TensorPlan, window: Window, tokens: int) -> tuple[int, ...]:
    """Return how many tokens the query at each position reads as codes."""
    return tuple(tokens_read_as_codes(form, window, position, form.recent_fraction) for position in range(tokens))


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


def additive_mask(mask: Tensor | None, tokens: int, query: Tensor) -> Tensor:
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
