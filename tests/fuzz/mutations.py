"""Damaged files: each is a pure function of the sound ones, a seed and a number, so that any can be made again."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 8, 16, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, 2**64, 1e308, -0.0, 0.5, float("nan"), float("inf"), "", "a", "../a", "\ud800",
    "9" * 40, [], {}, [[]], [0] * 50, {"a": 0},
)  # fmt: skip
LARGEST_BYTES = 2**16


def mutated(seeds: tuple[bytes, ...], words: tuple[bytes, ...], chance: random.Random) -> bytes:
    """Return one of the seeds with one to six things done to it."""
    content = chance.choice(seeds)
    if chance.random() < 0.35 and (changed := _json_changed(content, chance)) is not None:
        content = changed
        if chance.random() < 0.6:
            return content
    for _ in range(chance.randint(1, 6)):
        content = chance.choice(WAYS)(content, words, chance)[:LARGEST_BYTES]
    return content


def _span(content: bytes, chance: random.Random, longest: int = 64) -> tuple[int, int]:
    start = chance.randint(0, len(content))
    return start, min(len(content), start + chance.randint(0, longest))


def _flip(content: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    if not content:
        return b"\0"
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def _byte(content: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    start, _ = _span(content, chance)
    return content[:start] + bytes([chance.randrange(256)]) + content[start + chance.randint(0, 1) :]


def _cut(content: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    start, stop = _span(content, chance, 200)
    return content[:start] + content[stop:]


def _end(content: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    return content[: chance.randint(0, len(content))]


def _repeat(content: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    start, stop = _span(content, chance, chance.choice((1, 4, 64, 400)))
    times = 4_000 if chance.random() < 0.02 else chance.choice((2, 2, 3, 20, 20, 400))
    return content[:stop] + content[start:stop] * times + content[stop:]


def _word(content: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    start, stop = _span(content, chance, 8)
    word = chance.choice(words) if words else b"\n"
    return content[:start] + word + content[chance.choice((start, stop)) :]


def _number(content: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    start, _ = _span(content, chance)
    number, length = chance.choice(NUMBERS), chance.choice((1, 2, 4, 8))
    put = (number % 2 ** (8 * length)).to_bytes(length, "little")
    if chance.random() < 0.3:
        put = str(number).encode()
    return content[:start] + put + content[start + len(put) :]


def _swap(content: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    start, stop = _span(content, chance)
    at, _ = _span(content, chance)
    return content[:at] + content[start:stop] + content[at:]


WAYS: tuple[Callable[[bytes, tuple[bytes, ...], random.Random], bytes], ...] = (
    _flip, _byte, _cut, _end, _repeat, _word, _number, _swap,
)  # fmt: skip


def _json_changed(content: bytes, chance: random.Random) -> bytes | None:
    """Return a JSON file with one to three values replaced, removed, repeated or added; None for what is none."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    for _ in range(chance.randint(1, 3)):
        places = [place for place in _places(value) if place]
        if not places:
            break
        place = chance.choice(places)
        new = copy.deepcopy(chance.choice(VALUES))
        key: Any = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
        way = chance.random()
        if way < 0.6:
            place[key] = new
        elif way < 0.8:
            del place[key]
        elif isinstance(place, dict):
            place[chance.choice(("x", "", "schema", "layer", key + key))] = new
        else:
            place.extend(copy.deepcopy(place[key]) for _ in range(chance.choice((1, 50))))
    return json.dumps(value).encode("utf-8", errors="surrogatepass")


def _places(value: Any) -> list[Any]:
    found, waiting = [], [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list):
            found.append(each)
            waiting += each.values() if isinstance(each, dict) else each
    return found
