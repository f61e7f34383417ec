"""Pins: tensors whose width or format the user sets by hand, such as `key:0=8` or `value:3=rot2`.

Reads the pins' text and the tensors that a plan covers; writes a pin for each pinned tensor.
Does not know budgets or scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvprof.allocate.budget import CachedTensor
from kvprof.errors import UsageError, did_you_mean
from kvprof.records.formats import (
    FULL_BITS,
    TENSOR_WORDS,
    Format,
    TensorName,
    format_named,
    known_bits,
    tensor_named,
    usual_format,
)


@dataclass(frozen=True)
class Pin:
    """What one tensor is set to: a width of codes, in whichever format, or one format by name."""

    bits: int | None
    format: str | None
    text: str = field(compare=False)
    """As the user wrote it."""

    def __str__(self) -> str:
        return self.format or f"{self.bits} bits"

    def usual(self, tensor: CachedTensor, group_size: int) -> Format:
        """Return the format meant where none was scored: the usual one at the pin's bits, or the one that it names.

        Raises UsageError, naming the pin, for a format that the tensor's heads cannot have.
        """
        if self.bits is not None:
            return usual_format(tensor.stored_as, self.bits, group_size, tensor.head_dim)
        try:
            return format_named(str(self), tensor.stored_as, tensor.head_dim)
        except UsageError as error:
            raise UsageError(f"pin {self.text!r}, layer {tensor.layer}: {error}") from None


def check_pins(pins: Iterable[str]) -> None:
    """Raise UsageError, naming the pin, for one that no model's plan could have."""
    for text in pins:
        _parse(text)


def parse_pins(pins: Iterable[str], tensors: Sequence[CachedTensor]) -> dict[tuple[int, TensorName], Pin]:
    """Return the pin of each pinned tensor, by layer and name.

    pins: `key:0=8` one layer, `value:3-5=4` layers 3, 4 and 5, `key:*=4` every layer that the plan covers; what is set
    is a width, 16 or `full` for full precision, or a format: `key:0=int4g64`.
    Raises UsageError, naming the pin, for one that cannot be read, an unknown width or format, a layer that the plan
    does not cover, or two pins that disagree.
    """
    pin_of: dict[tuple[int, TensorName], Pin] = {}
    for text in pins:
        name, layers, pin = _parse(text)
        for layer in _covered(text, layers, tensors):
            if pin_of.setdefault((layer, name), pin) != pin:
                raise UsageError(
                    f"pin {text!r} sets the {name} of layer {layer} to {pin}, an earlier pin to "
                    f"{str(pin_of[layer, name]).removesuffix(' bits')}.\n  Keep one of the two."
                )
    return pin_of


def _parse(text: str) -> tuple[TensorName, range | None, Pin]:
    """Return the tensor, the layers (None for all) and what they are set to."""
    match = re.fullmatch(r"\s*(\w+)\s*:\s*(?:(\*)|(\d{1,9})(?:-(\d{1,9}))?)\s*=\s*(\w+)\s*", text, re.ASCII)
    if match is None:
        raise UsageError(
            f"cannot read the pin {text!r}.\n  Write it as key:0=8, value:3-5=4, key:*=4 or key:0=int4g64."
        )
    word, every, first, last, wanted = match.groups()
    name = tensor_named(word)
    if name is None:
        raise UsageError(f"pin {text!r}: no tensor is called {word!r}: {did_you_mean(word, TENSOR_WORDS)}")
    try:
        pin = _pin(wanted, name, text)
    except UsageError as error:
        raise UsageError(f"pin {text!r}: {error}") from None
    if every:
        return name, None, pin
    low, high = int(first), int(last or first)
    if low > high:
        raise UsageError(f"pin {text!r}: the layers {low}-{high} run backwards; write {high}-{low}.")
    return name, range(low, high + 1), pin


def _covered(text: str, layers: range | None, tensors: Sequence[CachedTensor]) -> Sequence[int]:
    """Return a pin's layers, all of which the plan must cover."""
    planned = sorted({tensor.layer for tensor in tensors})
    if layers is None:
        return planned
    if layers[-1] > planned[-1]:
        raise UsageError(f"pin {text!r}: there is no layer {layers[-1]} to plan; the last is {planned[-1]}.")
    unplanned = sorted(set(layers) - set(planned))
    if unplanned:
        raise UsageError(f"pin {text!r}: layer {unplanned[0]} is skipped, no plan gives it bits; leave it out.")
    return layers


def _pin(wanted: str, name: TensorName, text: str) -> Pin:
    """Return what the word behind the equals sign means."""
    if wanted.isdigit():
        (bits,) = known_bits([wanted])
        return Pin(bits, None, text)
    form = format_named(wanted, name, head_dim=2**10)  # whether this tensor's heads can have it shows later
    return Pin(FULL_BITS, None, text) if form.is_full else Pin(None, wanted, text)
