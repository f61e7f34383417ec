"""What two caches made of one prompt, side by side.

Reads texts and counts, prints them through `console`; knows nothing of how they were made.
"""

from __future__ import annotations

from kvprof.records.geometry import bytes_text
from kvprof.records.replies import Continuation, Continuations
from kvprof.report.console import print_plain, print_side_by_side


def show_continuations(found: Continuations, plan_name: str) -> None:
    """Print both texts beside each other with the bytes that each used, and how long they agree."""
    full, planned, shared_tokens = found.full, found.planned, found.shared_tokens
    print_side_by_side(
        _paragraphs(f"full precision, {found.dtype}", full, found.prompt_tokens),
        _paragraphs(plan_name, planned, found.prompt_tokens),
    )
    smaller = full.cache_bytes / planned.cache_bytes if planned.cache_bytes else float("inf")
    if shared_tokens == min(len(full.tokens), len(planned.tokens)) and len(full.tokens) == len(planned.tokens):
        agreement = "every new token is the same"
    else:
        agreement = f"the first {shared_tokens} of {max(len(full.tokens), len(planned.tokens))} new tokens are the same"
    size = "as large" if smaller == 1 else f"{smaller:.2f} times smaller"
    print_plain(f"{agreement}; the planned cache is {size}, its window included")


def _paragraphs(heading: str, one: Continuation, prompt_tokens: int) -> list[str]:
    # The last token written was never read, so the cache does not hold it.
    tokens = prompt_tokens + len(one.tokens) - 1
    cost = f"{one.cache_bytes} bytes ({bytes_text(one.cache_bytes)}) of cache, {tokens} tokens held"
    return [heading, one.text or "(nothing)", cost]
