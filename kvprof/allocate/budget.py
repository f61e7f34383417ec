"""What a plan may cost, and what it does cost: nominal bits, stored bits or bytes, exactly.

Reads limits as a user writes them, shapes and formats; writes a Limit, and a plan's Budget record.
Does not know scores, nor how a plan is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

from kvprof.errors import UsageError, did_you_mean
from kvprof.records.formats import Format, TensorName, TensorWord
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import Budget, head_dim_of, stored_like, tensor_word
from kvprof.records.words import parse_memory

Unit = Literal["nominal", "stored", "bytes"]
BIT_UNITS = ("nominal", "stored")


@dataclass(frozen=True)
class Limit:
    """What a plan may cost at most.

    bit_limit("2.5")                                        2.5 nominal bits per element
    bit_limit("3.25", "stored")                             3.25 bits per element, scales counted
    memory_limit("1.5GiB", context=32768, batch=4)          bytes of cache, window and skipped layers counted
    """

    amount: Fraction
    """Bits per element, averaged over the cached width, or bytes."""
    unit: Unit
    context: int = 0
    """Tokens a sequence; bytes only."""
    batch: int = 1
    """Sequences; bytes only."""


@dataclass(frozen=True)
class CachedTensor:
    """The keys or the values of one layer that a plan gives bits to."""

    layer: int
    name: TensorName
    shape: KVLayer | None
    """None where the geometry is unknown: every tensor then counts as one element wide."""

    @property
    def head_dim(self) -> int | None:
        """Elements a head, where known."""
        return None if self.shape is None else head_dim_of(self.shape, self.name)

    @property
    def word(self) -> TensorWord:
        """What it is called: its name, or `latent` and `rope` in a layer of latent attention."""
        return tensor_word(self.shape, self.name)

    @property
    def stored_as(self) -> TensorName:
        """Whose formats it has, along whose axis: its own name, but `key` for both parts of a latent."""
        return stored_like(self.shape, self.name)

    @property
    def width(self) -> int:
        """Cached elements a token."""
        return 1 if self.shape is None else self.shape.kv_heads * head_dim_of(self.shape, self.name)


def bit_limit(budget: str | float, unit: str | None = None) -> Limit:
    """Read a budget in bits per element; 2.3 means 23/10, not its nearest binary fraction.

    unit: "nominal" (the width of the codes; the default) or "stored" (scales counted).
    Raises UsageError for an unknown unit, or a budget that is not a finite number.
    """
    if unit not in (None, *BIT_UNITS):
        raise UsageError(f"unknown unit {unit!r}: {did_you_mean(str(unit), BIT_UNITS)}")
    try:
        amount = Decimal(str(budget))
    except InvalidOperation:
        amount = Decimal("nan")
    if not amount.is_finite() or abs(amount.adjusted()) > 30:
        raise UsageError(f"a budget of {budget} is not a number of bits.\n  Try --budget 2.5.")
    return Limit(Fraction(amount), "stored" if unit == "stored" else "nominal")


MOST_TOKENS = 2**36
"""That a cache is planned for: what more cost no longer counts in 64 bits."""


def memory_limit(memory: str, context: int, batch: int = 1) -> Limit:
    """Read a budget in bytes of cache, for `batch` sequences of `context` tokens; raises UsageError."""
    if context < 1 or batch < 1:
        raise UsageError(f"a cache of {batch} sequences of {context} tokens does not exist; both must be positive.")
    if context * batch > MOST_TOKENS:
        raise UsageError(f"{batch} sequences of {context} tokens are more than {MOST_TOKENS} tokens: check the two.")
    return Limit(Fraction(parse_memory(memory)), "bytes", context, batch)


def stored_bits_per_element(tensors: Sequence[CachedTensor], formats: Sequence[Format]) -> Fraction:
    """Return what an element of the cache stores, scales counted, averaged over the cached width: exactly."""
    widths = _widths(tensors, formats)
    stored = (width * form.stored_bits(head_dim) for (form, head_dim), width in widths.items())
    return sum(stored, Fraction(0)) / sum(widths.values())


def spent(
    tensors: Sequence[CachedTensor],
    formats: Sequence[Format],
    geometry: CacheGeometry | None,
    limit: Limit | None = None,
) -> Budget:
    """Return a plan's Budget record: what was asked for, and the cost in nominal bits, stored bits and bytes a token.

    formats: the chosen format of each tensor. The averages are weighted by cached width and rounded once, each from
    its exact value; rounding keeps order, so no average can exceed the limit it met exactly.
    """
    widths = _widths(tensors, formats)
    elements = sum(widths.values())
    stored = sum((width * form.stored_bits(head_dim) for (form, head_dim), width in widths.items()), Fraction(0))
    in_bytes = None
    if geometry is not None:
        pairs = [  # a window that is full grows no more
            (tensor, form)
            for tensor, form in zip(tensors, formats, strict=True)
            if tensor.shape is None or tensor.shape.window is None
        ]
        growing = _widths([tensor for tensor, _ in pairs], [form for _, form in pairs])
        in_bytes = float(
            sum(
                width * (geometry.element_bytes if form.is_full else form.stored_bits(head_dim) / 8)
                for (form, head_dim), width in growing.items()
            )
            + sum(geometry.indexer_bytes(geometry.layers[layer], 1) for layer in {tensor.layer for tensor in tensors})
        )
    return Budget(
        requested=None if limit is None else float(limit.amount),
        unit=None if limit is None else limit.unit,
        nominal_bits=float(Fraction(sum(width * form.bits for (form, _), width in widths.items()), elements)),
        stored_bits=float(stored / elements),
        bytes_per_token=in_bytes,
    )


def _widths(tensors: Sequence[CachedTensor], formats: Sequence[Format]) -> dict[tuple[Format, int | None], int]:
    """Return the cached elements a token of each format and head dimension: few, where exact sums are slow."""
    widths: dict[tuple[Format, int | None], int] = {}
    for tensor, form in zip(tensors, formats, strict=True):
        key = form, tensor.head_dim
        widths[key] = widths.get(key, 0) + tensor.width
    return widths
