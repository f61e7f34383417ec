"""Token sequences -> how much of them repeats itself: text that a model writes can be too poor to measure on.

Pure functions of token ids; does not know which model wrote them, nor what is done about it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

HOPELESS_SHARE = 0.9
"""Of all tokens: where so many repeat, next to nothing is left to measure on."""
HIGH_SHARE = 0.5
HIGH_REPEATING = 0.25
"""Of natural text, with its tables and rules of dashes, a few in a hundred tokens repeat the few before them."""
HOPELESS_BITS, HIGH_BITS = 0.5, 1.0
"""Natural text of words has about 8 bits a token, of bytes about 4, of the four letters of DNA about 2."""
FEWEST_TOKENS = 64
"""Fewer are too few to judge by."""
LONGEST_PERIOD = 32
_SHORTEST_RUN = 8


@dataclass(frozen=True)
class Repetition:
    """How much of a text repeats itself.

    tokens: in all. commonest: the share of the commonest token. repeating: of tokens in a run that only says again, at
    least twice, the up to LONGEST_PERIOD tokens before it. marks: of tokens that only begin or end a document.
    entropy_bits: of a token drawn from the text, whatever stands before it.
    """

    tokens: int
    commonest: float
    repeating: float
    marks: float
    entropy_bits: float

    @property
    def is_hopeless(self) -> bool:
        """Whether next to nothing is left that does not repeat."""
        return self.tokens >= FEWEST_TOKENS and (
            max(self.commonest, self.repeating, self.marks) >= HOPELESS_SHARE or self.entropy_bits < HOPELESS_BITS
        )

    @property
    def is_high(self) -> bool:
        """Whether more repeats than in any natural text."""
        return self.tokens >= FEWEST_TOKENS and (
            max(self.commonest, self.marks) >= HIGH_SHARE
            or self.repeating >= HIGH_REPEATING
            or self.entropy_bits < HIGH_BITS
        )

    def __str__(self) -> str:
        return (
            f"of {self.tokens} tokens, {self.commonest:.0%} are one and the same, {self.repeating:.0%} only repeat "
            f"those before them, {self.marks:.0%} only begin or end a document; "
            f"{self.entropy_bits:.1f} bits of entropy a token"
        )


def repetition_of(sequences: Sequence[Sequence[int]], marks: Collection[int] = ()) -> Repetition:
    """Return how much of some sequences repeats itself. marks: the tokens that begin or end a document."""
    counts = Counter(token for ids in sequences for token in ids)
    total = counts.total()
    if not total:
        return Repetition(0, 0.0, 0.0, 0.0, 0.0)
    shares = [count / total for count in counts.values()]
    return Repetition(
        tokens=total,
        commonest=max(shares),
        repeating=sum(map(_repeating, sequences)) / total,
        marks=sum(counts[token] for token in marks) / total,
        entropy_bits=-math.fsum(share * math.log2(share) for share in shares),
    )


def _repeating(ids: Sequence[int]) -> int:
    """Return how many tokens stand in a run that is the same as what stands one period before, for any short period."""
    found: set[int] = set()
    for period in range(1, min(LONGEST_PERIOD, len(ids) // 2) + 1):
        shortest, run = max(2 * period, _SHORTEST_RUN), 0
        for place in range(period, len(ids) + 1):
            if place < len(ids) and ids[place] == ids[place - period]:
                run += 1
                continue
            if run >= shortest:
                found.update(range(place - run, place))
            run = 0
    return len(found)
