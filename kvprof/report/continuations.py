"""What two caches made of one prompt, side by side.

Reads texts and counts, prints them through `console`; knows nothing of how they were made.
"""

from __future__ import annotations

from typing import NamedTuple

from kvprof.records.geometry import bytes_text
from kvprof.report.console import print_plain, print_side_by_side


class Written(NamedTuple):
    """A continuation, the tokens it has, and the bytes of the cache when it was done."""

    heading: str
    text: str
    tokens: int
    cache_bytes: int


def show_continuations(full: Written, planned: Written, prompt_tokens: int, shared_tokens: int) -> None:
    """Print both texts beside each other with the bytes that each used, and how long they agree."""
    print_side_by_side(*([one.heading, one.text or "(nothing)", _cost(one, prompt_tokens)] for one in (full, planned)))
    smaller = full.cache_bytes / planned.cache_bytes if planned.cache_bytes else float("inf")
    if shared_tokens == min(full.tokens, planned.tokens) and full.tokens == planned.tokens:
        agreement = "every new token is the same"
    else:
        agreement = f"the first {shared_tokens} of {max(full.tokens, planned.tokens)} new tokens are the same"
    size = "as large" if smaller == 1 else f"{smaller:.2f} times smaller"
    print_plain(f"{agreement}; the planned cache is {size}, its window included")


def _cost(one: Written, prompt_tokens: int) -> str:
    # The last token written was never read, so the cache does not hold it.
    tokens = prompt_tokens + one.tokens - 1
    return f"{one.cache_bytes} bytes ({bytes_text(one.cache_bytes)}) of keys and values, {tokens} tokens cached"
