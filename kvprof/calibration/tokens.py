"""Text -> token ids: what a tokenizer puts before a text, and one message where it fails.

Asks a tokenizer; does not know rows, sequences, nor the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kvprof.errors import CalibrationError, KvprofError, first_line, is_out_of_memory

_PROBES = ("a", "the", "0")
_WORDS_TRIED = 64
"""Words of its own vocabulary that a tokenizer is asked for, where it knows none of the probes."""


@dataclass(frozen=True)
class Beginning:
    """What stands before every text, as the tokenizer puts it there.

    ids: the tokens, none where it puts nothing. tokens: the same in words; None where it is not known what stands
    there.
    """

    ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] | None = None


UNKNOWN = Beginning()


def beginning_of(tokenizer: Any) -> Beginning:
    """Return what a tokenizer puts before a text, chat templates aside: `<bos>`, `[CLS]` or nothing.

    Found by a text tokenized with and without special tokens. UNKNOWN where the one does not hold the other.
    Raises CalibrationError for a tokenizer that can read nothing.
    """
    failure = None
    for text in _probes(tokenizer):
        try:
            plain = token_ids(tokenizer, text, marks=False)
            marked = token_ids(tokenizer, text)
        except CalibrationError as error:
            failure = failure or error
            continue
        if not plain:
            continue
        for start in range(len(marked) - len(plain) + 1):
            if marked[start : start + len(plain)] == plain:
                return _named(tokenizer, tuple(marked[:start]))
        return UNKNOWN
    if failure is not None:
        raise failure
    return UNKNOWN


def token_ids(tokenizer: Any, text: str, marks: bool = True) -> list[int]:
    """Return the tokens of a text, with or without the marks of a beginning and an end that a tokenizer may add.

    Raises CalibrationError where the tokenizer fails.
    """
    given = {} if marks else {"add_special_tokens": False}
    with tokenizer_explained(tokenizer):
        return [int(token) for token in tokenizer(text, truncation=False, verbose=False, **given)["input_ids"]]


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the tokens that a tokenizer reads as marks where they stand in a text."""
    added = getattr(tokenizer, "get_added_vocab", dict)
    return {*map(str, getattr(tokenizer, "all_special_tokens", ())), *map(str, added())}


def vocabulary_size(tokenizer: Any) -> int | None:
    """Return how many tokens a tokenizer has; None where it does not say."""
    try:
        return len(tokenizer)
    except (TypeError, NotImplementedError):
        return None


@contextlib.contextmanager
def tokenizer_explained(tokenizer: Any) -> Iterator[None]:
    """Turn whatever a tokenizer raises, which may be the model's own code, into one CalibrationError."""
    try:
        yield
    except KvprofError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CalibrationError(
            f"the tokenizer ({type(tokenizer).__name__}) fails on text: {type(error).__name__}: {first_line(error)}\n"
            "  Check the tokenizer files of the model, such as tokenizer.json."
        ) from None


def _named(tokenizer: Any, ids: tuple[int, ...]) -> Beginning:
    if not ids:
        return Beginning((), ())
    with tokenizer_explained(tokenizer):
        return Beginning(ids, tuple(str(token) or "?" for token in tokenizer.convert_ids_to_tokens(list(ids))))


def _probes(tokenizer: Any) -> Iterator[str]:
    """Yield short texts; a tokenizer without a token for unknown words reads only those of its own vocabulary."""
    yield from _PROBES
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else ()
    yield from islice((word for word in vocabulary if word not in special), _WORDS_TRIED)
