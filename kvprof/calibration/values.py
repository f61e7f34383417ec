"""What the values of a column are where they are no text: ids, links, file names, dates, labels.

Reads the values alone; does not know the column's name, nor the other columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

_MOSTLY = 0.9
"""Share of a column's values that are ids, links and the like, from which on the column is none of text."""

_LOOKED_AT = 4096
"""Characters of a value that are looked at."""
_FEW = 3
"""Values of one word each, from which on they are names or labels rather than text."""
_REPEATED = 6
"""Short values of which no more than half differ, from which on they are labels rather than text."""
_LABEL_WORDS = 4
_LABEL_CHARACTERS = 40
"""Words and characters that a label has at most."""
_ENDS = ".?!…。？！؟।"  # noqa: RUF001 - of sentences in several scripts

_LINK = re.compile(r"\w+://(?:\S+|[^\n]+\.\w{2,4})|www\.\S+|(?:mailto|data|urn|doi):\S+", re.IGNORECASE)
_EMAIL = re.compile(r"(?:[^@\n<>]{0,80}<)?[^\s@<>]+@[^\s@<>]+\.[^\s@<>]+>?")
_FILE = re.compile(
    r"[^\n]{1,300}\.(?:png|jpe?g|gif|webp|bmp|tiff?|svg|ico|heic|mp[34]|wav|flac|ogg|opus|m4a|aac|avi|mov|mkv|webm)|"
    r"[\w.~@%+=:-]*(?:[/\\][\w.~@%+=:-]+)+[/\\]?|[\w-]+(?:\.[\w-]+)+",
    re.IGNORECASE | re.ASCII,
)
"""A picture, a sound or a film; or one word that is a path, or a name with dots in it, as files and hosts have."""
_IDENTIFIER = re.compile(r"[@#]\w+|(?=\D*\d)[\w.:@#+/\\|~%$*&-]+={0,2}", re.ASCII)
"""One word of ASCII with a digit in it: other scripts write whole sentences without a space, code has brackets."""
_KEY = re.compile(r"[a-z]+[_:#-]\d+|[a-z]*[_-]?\d{5,}|[0-9a-f]{16,}|[0-9a-f]+(?:-[0-9a-f]+){3,}", re.IGNORECASE)
"""One word that is an id wherever it stands: `q_00011`, a long number, a hash, a UUID."""
_REFERENCE = re.compile(
    r"[a-z]+[_:#]\d+|[a-z]+-?\d{4,}|[0-9a-f]{16,}|[0-9a-f]+(?:-[0-9a-f]+){3,}|\S+\.[a-z][a-z0-9]{1,3}", re.IGNORECASE
)
"""An id that no short answer looks like: COVID-19, F-16 and 1945 are answers."""
_NUMBER = re.compile(
    r"(?=\D{0,64}\d)[$€£¥]?[\d.,:/%+°TZ年月日时分秒時년월일시분초-]{1,64}(?:st|nd|rd|th|am|pm)?", re.IGNORECASE
)
_DATE_WORD = re.compile(
    r"(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec|mon|tue|tues|wed|thu|thurs?|fri|sat|sun|am|pm|utc|gmt|"
    r"[ecmp][sd]t|t|z|january|february|march|april|august|september|october|november|december|"
    r"(?:mon|tues|wednes|thurs|fri|satur|sun)day)\.?",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_][^\W\d]*(?:[-/][^\W\d]+)*")
UNSPACED = "\u0e00"
"""From Thai on, many scripts write sentences without spaces."""
_SEPARATED = re.compile(r"[\s,;|\[\]{}'\"]+")


def not_text(values: Sequence[str]) -> str | None:
    """Return what values are, in the plural, where they are no text under whatever name; None where they may be text.

    Ids, links, file names, e-mail addresses, numbers and dates by the look of most of them; labels by few of many
    short ones that differ.
    """
    held = _held(values)
    kinds = [next((kind for kind, is_one in _KINDS if is_one(value)), None) for value in held]
    known = [kind for kind in kinds if kind is not None]
    if held and len(known) >= _MOSTLY * len(held):
        return max(known, key=known.count)
    short = all(map(_is_short, held))
    return "labels" if short and len(held) >= _REPEATED and len(set(held)) <= len(held) / 2 else None


def hardly_text(values: Sequence[str]) -> str | None:
    """Return what values are, in the plural, where only a name such as `text` could speak for them; None otherwise."""
    held = _held(values)
    if held and all(_is_json(value) for value in values if value.strip()):
        return "JSON"
    if held and all(value.isascii() and len(value) == 1 for value in held):
        return "single characters"
    return "single words" if len(held) >= _FEW and all(map(_is_word, held)) else None


def are_references(values: Sequence[str]) -> bool:
    """Whether values say where something is, as links, file names and ids do: a number, a date or a word can answer."""
    held = _held(values)
    return bool(held) and sum(map(_is_reference, held)) >= _MOSTLY * len(held)


def _held(values: Sequence[str]) -> list[str]:
    return [value.strip()[:_LOOKED_AT] for value in values if value.strip()]


def _is_short(value: str) -> bool:
    """Whether a value is as short as a label, and does not end as a sentence does."""
    return len(value.split()) <= _LABEL_WORDS and len(value) < _LABEL_CHARACTERS and value[-1] not in _ENDS


def _is_link(value: str) -> bool:
    return _all_of(value, _LINK)


def _is_email(value: str) -> bool:
    return _EMAIL.fullmatch(value) is not None or _all_of(value, _EMAIL)


def _is_date(value: str) -> bool:
    words = [word for word in re.split(r"[\s,]+", value) if word]
    is_written = all(_NUMBER.fullmatch(word) or _DATE_WORD.fullmatch(word) for word in words)
    return is_written and re.search(r"\d", value) is not None


def _is_id(value: str) -> bool:
    """Whether a value is an id, or a list of them: with commas between any, with spaces those that are sure to be."""
    if _IDENTIFIER.fullmatch(value):
        return True
    return _all_of(value, _IDENTIFIER if re.search(r"[,;|]", value) else _KEY)


def _is_file(value: str) -> bool:
    return _FILE.fullmatch(value) is not None or _all_of(value, _FILE)


def _is_reference(value: str) -> bool:
    if _NUMBER.fullmatch(value):
        return False
    return _is_link(value) or _REFERENCE.fullmatch(value) is not None


def _is_word(value: str) -> bool:
    return len(value) < _LABEL_CHARACTERS and _WORD.fullmatch(value) is not None and max(value) < UNSPACED


def _all_of(value: str, entry: re.Pattern[str]) -> bool:
    """Whether a value is one entry, or a list of nothing else."""
    if entry.fullmatch(value):
        return True
    words = [word for word in _SEPARATED.split(value) if word]
    if len(value) == _LOOKED_AT:  # the last one is cut
        words = words[:-1] or words
    return bool(words) and all(entry.fullmatch(word) for word in words)


def _is_json(value: str) -> bool:
    """Whether a value is a record or a list as JSON: what is known about a text, rather than text."""
    value = value.strip()
    try:
        return value[:1] in ("{", "[") and json.loads(value) is not None
    except (ValueError, RecursionError):
        return False


_KINDS = (
    ("links", _is_link),
    ("e-mail addresses", _is_email),
    ("numbers or dates", _is_date),
    ("file names", _is_file),
    ("ids", _is_id),
)
