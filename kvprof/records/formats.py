"""How one cached tensor is stored: scheme, code width, grouping. The one place that knows stored bits.

Plain arithmetic; the rounding itself is the runtime's business.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from kvprof.errors import UsageError, did_you_mean
from kvprof.records.document import Positive, Record
from kvprof.records.external_formats import EXTERNAL

OWN_SCHEMES = ("asymmetric", "rotated")
"""What kvprof's own cache stores; every other scheme is the format of another runtime, by its name there."""
SCHEMES = (*OWN_SCHEMES, *EXTERNAL)


def _known_scheme(scheme: str) -> str:
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme[:60]!r}: {did_you_mean(scheme, SCHEMES)}")
    return scheme


Scheme = Annotated[str, Field(strict=True, json_schema_extra={"enum": list(SCHEMES)}), AfterValidator(_known_scheme)]
Axis = Literal["channel", "token"]
Clip = Literal["none", "mse"]
TensorName = Literal["key", "value"]
TensorWord = Literal["key", "value", "latent", "rope"]

TENSORS: tuple[TensorName, TensorName] = ("key", "value")
LATENT_TENSORS: dict[TensorName, TensorWord] = {"key": "latent", "value": "rope"}
"""What a layer of latent attention (MLA) caches in the place of each: the vector that keys and values are made of, and
the rotary part of all its heads' keys."""
TENSOR_WORDS = (*TENSORS, *LATENT_TENSORS.values())
"""What an option may call a tensor."""
USUAL_AXIS: dict[TensorName, Axis] = {"key": "channel", "value": "token"}
CODE_BITS = (1, 2, 3, 4, 5, 6, 8)
"""Widths that codes can be packed to without waste."""
FULL_BITS = 16
"""In a plan: kept in the model's own dtype, no codes, no scales."""

ASYMMETRIC_GROUP_BITS = 32
"""A float16 scale and a float16 zero point."""
ROTATED_GROUP_BITS = 16
"""A float16 scale for each token and head."""


def tensor_named(word: str) -> TensorName | None:
    """Return the tensor of a word: `key`, `value`, and `latent` and `rope` for what stands in their place."""
    return next((tensor for tensor in TENSORS if word in (tensor, LATENT_TENSORS[tensor])), None)


class Format(Record):
    """One way to store a tensor of the cache.

    Format(bits=4, group_size=32, axis="channel")                       int4g32
    Format(bits=2, group_size=64, axis="token", clip="mse")             int2g64c
    Format(scheme="rotated", bits=3, group_size=64, axis="token")       rot3
    Format(scheme="q4_0", bits=4, group_size=32, axis="token")          q4_0
    Format(bits=16, group_size=32, axis="token")                        full
    """

    scheme: Scheme = "asymmetric"
    bits: Positive
    group_size: Positive
    axis: Axis
    clip: Clip = "none"

    @model_validator(mode="after")
    def _can_be_stored(self) -> Self:
        if self.scheme in EXTERNAL:
            self._check_external()
            return self
        if self.bits not in (*CODE_BITS, FULL_BITS):
            raise ValueError(f"bits must be one of {', '.join(map(str, CODE_BITS))} or {FULL_BITS}, found {self.bits}")
        if self.scheme == "rotated":
            if self.axis != "token":
                raise ValueError("scheme 'rotated' has one scale a token and head: its axis must be 'token'")
            if self.group_size & (self.group_size - 1):
                raise ValueError(f"scheme 'rotated' needs a power of two as group_size, found {self.group_size}")
            if self.clip != "none":
                raise ValueError("scheme 'rotated' has nothing to clip: clip must be 'none'")
        return self

    def _check_external(self) -> None:
        form = EXTERNAL[self.scheme]
        expected = {"bits": form.bits, "axis": "token", "clip": "none"}
        if form.block:
            expected["group_size"] = form.block
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ValueError(f"scheme {self.scheme!r} has {name} {value!r}, found {getattr(self, name)!r}")

    def __hash__(self) -> int:
        return hash((self.scheme, self.bits, self.group_size, self.axis, self.clip))  # a record's own hash is slow

    @property
    def is_full(self) -> bool:
        """Whether the tensor stays in the model's own dtype."""
        return self.bits == FULL_BITS

    @property
    def is_external(self) -> bool:
        """Whether this is another runtime's format, which kvprof can score and plan but its cache cannot store."""
        return self.scheme in EXTERNAL

    def is_external_of(self, head_dim: int) -> bool:
        """Whether heads of a dimension have this format of another runtime, in blocks of this size."""
        form = EXTERNAL[self.scheme]
        return form.fits(head_dim) and form.group_size(head_dim) == self.group_size

    @property
    def group_bits(self) -> int:
        """Bits that each group stores beside its codes."""
        if self.is_external:
            return EXTERNAL[self.scheme].side_bits
        return ROTATED_GROUP_BITS if self.scheme == "rotated" else ASYMMETRIC_GROUP_BITS

    @property
    def name(self) -> str:
        """The short name: `int2g64c`, `rot3`, `q4_0`, `full`."""
        if self.is_full:
            return "full"
        if self.is_external:
            return self.scheme
        if self.scheme == "rotated":
            return f"rot{self.bits}"
        return f"int{self.bits}g{self.group_size}" + ("c" if self.clip == "mse" else "")

    @property
    def unit_tokens(self) -> int:
        """Tokens that are quantized at once: a group along axis `channel`, else one."""
        return 1 if self.axis == "token" or self.is_full else self.group_size

    def fills_bytes(self, head_dim: int) -> bool:
        """Whether the codes of a token and head fill whole bytes, so that they are packed by themselves."""
        return head_dim * self.bits % 8 == 0

    def stored_bits(self, head_dim: int | None = None) -> Fraction:
        """Bits an element takes with its share of scale and zero point, exactly.

        head_dim: where a token-axis group does not divide it, the last group of each head is shorter and costs as much
        as a whole one; without it the group is taken to divide.
        """
        if self.is_full:
            return Fraction(FULL_BITS)
        if self.axis == "channel" or head_dim is None:
            return self.bits + Fraction(self.group_bits, self.group_size)
        groups_per_head = -(-head_dim // self.group_size)
        return self.bits + Fraction(self.group_bits * groups_per_head, head_dim)


def usual_format(tensor: TensorName, bits: int, group_size: int, head_dim: int | None = None) -> Format:
    """Return the plain format for keys (per channel) or values (per token, the group capped at the head dimension)."""
    axis = USUAL_AXIS[tensor]
    if axis == "token" and head_dim is not None:
        group_size = min(group_size, head_dim)
    return Format(bits=bits, group_size=group_size, axis=axis)


@functools.cache
def format_named(name: str, tensor: TensorName, head_dim: int | None = None) -> Format:
    """Return the format of a short name, as `Format.name` writes it, along the tensor's usual axis.

    head_dim: of the tensor's heads: a group of channels is capped at it, and `rot3` needs to know it.
    Raises UsageError for a name that says no format, or one that heads of this dimension cannot have.
    """
    if name == "full":
        return usual_format(tensor, FULL_BITS, 1)
    if name in EXTERNAL:
        return _external_format(name, tensor, head_dim)
    plain, rotated = re.fullmatch(r"int(\d)g(\d{1,9})(c?)", name), re.fullmatch(r"rot(\d)", name)
    found = plain or rotated
    bits = int(found[1]) if found else 0
    if bits not in CODE_BITS or (plain is not None and int(plain[2]) < 1):
        widths = ", ".join(map(str, CODE_BITS))
        others = [one for one, form in EXTERNAL.items() if form.word in (None, one)]
        raise UsageError(
            f"{name!r} is no format: write int3g64, int2g64c (clipped), rot2 or full; bits are {widths}.\n"
            f"  Of other runtimes there are {', '.join(others)}."
        )
    if plain is not None:
        form = usual_format(tensor, bits, int(plain[2]), head_dim)
        return form.model_copy(update={"clip": "mse"}) if plain[3] else form
    if head_dim is None or not can_rotate(head_dim):
        heads = "an unknown head dimension" if head_dim is None else f"heads of {head_dim} channels"
        raise UsageError(f"{name} needs a head dimension that is a power of two; the {tensor} has {heads}.")
    return Format(scheme="rotated", bits=bits, group_size=head_dim, axis="token")


def _external_format(name: str, tensor: TensorName, head_dim: int | None) -> Format:
    form = EXTERNAL[name]
    if not form.fits(head_dim):
        heads = "an unknown head dimension" if head_dim is None else f"heads of {head_dim} channels"
        whole = f"heads that are {form.heads}" if head_dim is not None or form.block else "a known head dimension"
        raise UsageError(f"{name} needs {whole}; the {tensor} has {heads}.")
    return Format(scheme=name, bits=form.bits, group_size=form.group_size(head_dim), axis="token")


def can_rotate(head_dim: int) -> bool:
    """Whether the scheme `rotated` can store heads of this dimension: a power of two."""
    return head_dim & (head_dim - 1) == 0


def parse_formats(text: str) -> dict[TensorName, tuple[str, ...]]:
    """Return the format names that a text such as "int3g64,rot2" or "key:int2g64c,value:rot2" lists for each tensor.

    A name without a tensor counts for both; `latent:` and `rope:` are the keys and the values of latent attention.
    Raises UsageError, naming the word, for one that is no format.
    """
    chosen: dict[TensorName, dict[str, None]] = {"key": {}, "value": {}}
    for word in (part.strip() for part in text.split(",")):
        before, colon, name = word.rpartition(":")
        wanted = [tensor for tensor in TENSORS if not colon or tensor == tensor_named(before)]
        if not wanted:
            raise UsageError(f"{word!r}: no tensor is called {before!r}; write key:{name} or value:{name}.")
        for tensor in wanted:
            format_named(name, tensor, head_dim=2**10)  # whether a model's heads can have it shows with the model
            chosen[tensor][name] = None
    return {tensor: tuple(names) for tensor, names in chosen.items()}


def known_bits(widths: Iterable[int | str]) -> tuple[int, ...]:
    """Return widths ascending, each once; raises UsageError for one that no codes are packed to, or for none."""
    known = {str(bits): bits for bits in (*CODE_BITS, FULL_BITS)}
    words = [str(width) for width in widths]
    for word in words:
        if word not in known:
            raise UsageError(f"{word!r} is not a width of codes; choose from {', '.join(known)}")
    if not words:
        raise UsageError(f"no widths to choose from; name some of {', '.join(known)}")
    return tuple(sorted({known[word] for word in words}))
