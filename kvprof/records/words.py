"""How layers and numbers of things are written for people, and how people write layers and memory.

Knows no record: takes and returns numbers and text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import groupby

from kvprof.errors import UsageError, did_you_mean

BYTES: dict[str, int] = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def counted(number: int, what: str) -> str:
    """Return a number of things: 1 sequence, 8,192 tokens."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def context_text(tokens: int) -> str:
    """Return tokens of context in thousands of 1,024 where they are so many: 4k, 512."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def short_digest(digest: object) -> str:
    """Return the beginning of a digest or a fingerprint, which tells it from others: sha256:0123456789ab..."""
    return f"{str(digest)[:19]}..."


def runs_of(layers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and last of each run of layers without a gap, ascending."""
    found = []
    for _, group in groupby(enumerate(sorted(set(layers))), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        found.append((run[0], run[-1]))
    return found


def layers_text(layers: Sequence[int]) -> str:
    """Return layer numbers with their runs shortened: layers 0-4, 6."""
    runs = [str(first) if first == last else f"{first}-{last}" for first, last in runs_of(layers)]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(runs)}"


def read_layers(text: str, option: str) -> list[range]:
    """Return the runs of layers that a text such as "0-3,7" names, as they are written; whether there are such is open.

    option: that takes the text, for the message. Raises UsageError for what names no layer, or runs backwards.
    """
    runs = []
    for word in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?", word, re.ASCII)
        if match is None:
            raise UsageError(f"{option} {text!r}: cannot read {word!r} as a layer.\n  Write layers as 0-3,7.")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise UsageError(f"{option} {text!r}: {word} runs backwards; write {high}-{low}.")
        runs.append(range(low, high + 1))
    return runs


def parse_memory(text: str) -> int:
    """Return the bytes that a text such as "1.5GiB" or "800 MB" means, rounded down; raises UsageError."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]+)", text.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"cannot read {text!r} as an amount of memory.\n  Write a number and a unit: 1.5GiB, 800MB.")
    number, unit = match.groups()
    name = {name.lower(): name for name in BYTES}.get(unit.lower())
    if name is None:
        raise UsageError(f"unknown unit {unit!r} in {text!r}: {did_you_mean(unit, BYTES)}")
    amount = math.floor(Fraction(number) * BYTES[name])
    if amount < 1:
        raise UsageError(f"{text!r} is less than one byte of memory.\n  Write a number and a unit: 1.5GiB, 800MB.")
    return amount
