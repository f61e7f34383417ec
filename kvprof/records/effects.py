"""Signed first-order effects of formats on the loss, block of positions by block, as a Scores file keeps them.

Reads and writes text: the sum of the squares of all positions' effects, then the sum of the effects of each block.
Does not know what the numbers are for (long_run.py).
"""

from __future__ import annotations

import base64
import binascii
import math
import sys
from array import array
from collections.abc import Iterable

MOST_BLOCKS = 64
"""Of a sequence. More would make a larger file and find the same bandwidths: a block is 8 tokens of 512."""


def block_tokens(counted: int) -> int:
    """Return the positions of a block, where so many positions of the longest sequence count."""
    return -(-counted // MOST_BLOCKS)


def encode(squares: float, sums: Iterable[float]) -> str:
    """Return effects as text: float32, little-endian, in base64. Raises OverflowError for a number beyond float32.

    squares: sum over positions of their effects' squares. sums: of each block's effects.
    """
    series = array("f", [squares, *sums])
    if not all(map(math.isfinite, series)):
        raise OverflowError("an effect is not finite in float32")
    if sys.byteorder == "big":
        series.byteswap()
    return base64.b64encode(series.tobytes()).decode()


def decode(text: str) -> array[float]:
    """Return the squares and sums that `encode` wrote; raises ValueError for a text that it does not write."""
    try:
        series = array("f", base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        raise ValueError("it is not float32 in base64") from None
    if sys.byteorder == "big":
        series.byteswap()
    if len(series) < 2:
        raise ValueError("it holds no block")
    if not all(map(math.isfinite, series)) or series[0] < 0:
        raise ValueError("it holds a number that is not finite, or a negative sum of squares")
    return series
