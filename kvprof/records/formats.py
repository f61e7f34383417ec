"""How one cached tensor is stored: scheme, code width, grouping. The one place that knows stored bits.

Plain arithmetic; the rounding itself is the runtime's business.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import model_validator
from typing_extensions import Self

from kvprof.records.document import Positive, Record

Scheme = Literal["asymmetric", "rotated"]
Axis = Literal["channel", "token"]
Clip = Literal["none", "mse"]
TensorName = Literal["key", "value"]

TENSORS: tuple[TensorName, TensorName] = ("key", "value")
USUAL_AXIS: dict[TensorName, Axis] = {"key": "channel", "value": "token"}
CODE_BITS = (1, 2, 3, 4, 5, 6, 8)
"""Widths that codes can be packed to without waste."""
FULL_BITS = 16
"""In a plan: kept in the model's own dtype, no codes, no scales."""

ASYMMETRIC_GROUP_BITS = 32
"""A float16 scale and a float16 zero point."""
ROTATED_GROUP_BITS = 16
"""A float16 scale for each token and head."""


class Format(Record):
    """One way to store a tensor of the cache.

    Format(bits=4, group_size=32, axis="channel")                       int4g32
    Format(bits=2, group_size=64, axis="token", clip="mse")             int2g64c
    Format(scheme="rotated", bits=3, group_size=64, axis="token")       rot3
    Format(bits=16, group_size=32, axis="token")                        full
    """

    scheme: Scheme = "asymmetric"
    bits: Positive
    group_size: Positive
    axis: Axis
    clip: Clip = "none"

    @model_validator(mode="after")
    def _can_be_stored(self) -> Self:
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

    @property
    def is_full(self) -> bool:
        """Whether the tensor stays in the model's own dtype."""
        return self.bits == FULL_BITS

    @property
    def name(self) -> str:
        """The short name: `int2g64c`, `rot3`, `full`."""
        if self.is_full:
            return "full"
        if self.scheme == "rotated":
            return f"rot{self.bits}"
        return f"int{self.bits}g{self.group_size}" + ("c" if self.clip == "mse" else "")

    def stored_bits(self, head_dim: int | None = None) -> Fraction:
        """Bits an element takes with its share of scale and zero point, exactly.

        head_dim: where a token-axis group does not divide it, the last group of each head is shorter and costs as much
        as a whole one; without it the group is taken to divide.
        """
        if self.is_full:
            return Fraction(FULL_BITS)
        group_bits = ROTATED_GROUP_BITS if self.scheme == "rotated" else ASYMMETRIC_GROUP_BITS
        if self.axis == "channel" or head_dim is None:
            return self.bits + Fraction(group_bits, self.group_size)
        groups_per_head = -(-head_dim // self.group_size)
        return self.bits + Fraction(group_bits * groups_per_head, head_dim)


def usual_format(tensor: TensorName, bits: int, group_size: int, head_dim: int | None = None) -> Format:
    """Return the plain format for keys (per channel) or values (per token, the group capped at the head dimension)."""
    axis = USUAL_AXIS[tensor]
    if axis == "token" and head_dim is not None:
        group_size = min(group_size, head_dim)
    return Format(bits=bits, group_size=group_size, axis=axis)
