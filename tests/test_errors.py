"""What an error says on one line: the library's own words, all of them."""

from __future__ import annotations

import pytest

from kvprof.errors import ModelError, first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\n  (1) two,\n\n  (2) three."), "one (1) two, (2) three."),
        (ValueError("long " * 400), ("long " * 400).strip()),
        (KeyError("added_tokens"), "KeyError: 'added_tokens'"),
        (RuntimeError(), "RuntimeError"),
        (ModelError("what went wrong.\n  What to do."), "what went wrong."),
        (ModelError("long " * 400 + "\n  What to do."), ("long " * 400).strip()),
    ],
    ids=["lines", "long", "key", "empty", "own", "own and long"],
)
def test_nothing_that_a_library_says_is_cut(error: Exception, said: str) -> None:
    assert first_line(error) == said
