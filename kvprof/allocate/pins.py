"""Pins: tensors whose width the user sets by hand, such as `key:0=8`.

Reads the pins' text and the tensors that a plan covers; writes a width for each pinned tensor.
Does not know budgets or scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kvprof.allocate.budget import CachedTensor, known_bits
from kvprof.errors import UsageError, did_you_mean
from kvprof.records.formats import TENSORS, TensorName


def parse_pins(pins: Iterable[str], tensors: Sequence[CachedTensor]) -> dict[tuple[int, TensorName], int]:
    """Return the bits of each pinned tensor, by layer and name.

    pins: `key:0=8` one layer, `value:3-5=4` layers 3, 4 and 5, `key:*=4` every layer that the plan covers.
    Raises UsageError, naming the pin, for one that cannot be read, an unknown width, a layer that the plan does not
    cover, or two pins that disagree.
    """
    bits_of: dict[tuple[int, TensorName], int] = {}
    for pin in pins:
        name, layers, bits = _parse(pin, tensors)
        for layer in layers:
            if bits_of.setdefault((layer, name), bits) != bits:
                raise UsageError(
                    f"pin {pin!r} sets the {name} of layer {layer} to {bits} bits, an earlier pin to "
                    f"{bits_of[layer, name]}.\n  Keep one of the two."
                )
    return bits_of


def _parse(pin: str, tensors: Sequence[CachedTensor]) -> tuple[TensorName, Sequence[int], int]:
    match = re.fullmatch(r"\s*(\w+)\s*:\s*(?:(\*)|(\d{1,9})(?:-(\d{1,9}))?)\s*=\s*(\w+)\s*", pin, re.ASCII)
    if match is None:
        raise UsageError(f"cannot read the pin {pin!r}.\n  Write it as key:0=8, value:3-5=4 or key:*=4.")
    word, every, first, last, width = match.groups()
    name = next((tensor for tensor in TENSORS if tensor == word), None)
    if name is None:
        raise UsageError(f"pin {pin!r}: no tensor is called {word!r}: {did_you_mean(word, TENSORS)}")
    try:
        (bits,) = known_bits([width])
    except UsageError as error:
        raise UsageError(f"pin {pin!r}: {error}") from None
    planned = sorted({tensor.layer for tensor in tensors})
    if every:
        return name, planned, bits
    low, high = int(first), int(last or first)
    if low > high:
        raise UsageError(f"pin {pin!r}: the layers {low}-{high} run backwards; write {high}-{low}.")
    if high > planned[-1]:
        raise UsageError(f"pin {pin!r}: there is no layer {high} to plan; the last is {planned[-1]}.")
    unplanned = sorted(set(range(low, high + 1)) - set(planned))
    if unplanned:
        raise UsageError(f"pin {pin!r}: layer {unplanned[0]} is skipped, no plan gives it bits; leave it out.")
    return name, range(low, high + 1), bits
