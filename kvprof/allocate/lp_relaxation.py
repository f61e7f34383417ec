"""Many knapsacks of the same costs at once, in the linear relaxation: what a bootstrap can afford.

Reads losses of many problems and the costs they share; writes each problem's best mixture. Does not know what an item
is. In the relaxation an item may take a mixture of two choices. That makes it quick, and fair to compare: no selection
is better or worse than another only because its last item did or did not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SPAN = 60.0
"""Logarithm of the widest range of prices that is searched at first: 26 orders of magnitude."""
BRACKET = 1.5
"""Of the range that is searched for each problem, about the price of the mean problem."""
PRECISION = 1e-5
"""To which the logarithm of a price is found; a mixture between two prices so near is as good as the best."""


@dataclass(frozen=True)
class Mixtures:
    """The best selection of each of R problems: nearly every item takes one choice, at most a few mix two."""

    picks: Ints
    """(R, I): each item's choice, or the cheaper of two; together they fit the capacity."""
    dearer: Ints
    """(R, I): each item's choice, or the dearer of two."""
    share: Floats
    """(R,): how much of the dearer ones there is, so that all of the capacity is spent."""

    def loss(self, losses: Floats) -> Floats:
        """Return what each selection loses by any losses, (I, K) or its own of (R, I, K): (R,)."""
        return (1 - self.share) * total(losses, self.picks) + self.share * total(losses, self.dearer)


def relax(losses: Floats, costs: Floats, capacity: float) -> Mixtures:
    """Return each problem's best mixture: the least total loss whose total cost fits the capacity.

    losses: (R, I, K), infinite where an item has fewer choices. costs: (I, K), finite. Of choices that are equal at
    the price found, the first is taken; the same losses always give the same mixture.
    Raises ValueError where the cheapest choices cost more than the capacity.

    Method: the price of a unit of cost is found by bisection for each problem, at which every item's best choice just
    fits, and just does not. Between the two selections every mixture is optimal at its own cost.
    """
    extra = costs - costs.min(axis=1, keepdims=True)
    spare = float(capacity - costs.min(axis=1).sum())
    if spare < 0:
        raise ValueError(f"the cheapest choices cost {-spare} more than the capacity")
    picks = _picks(losses, extra, np.zeros(len(losses)))
    dearer = picks.copy()
    share = np.zeros(len(losses))
    dear = _cost(extra, picks) > spare  # elsewhere the best choices fit without a price
    if dear.any():
        low, high = _prices(losses[dear], extra, spare)
        picks[dear], dearer[dear] = _picks(losses[dear], extra, high), _picks(losses[dear], extra, low)
        least, most = _cost(extra, picks[dear]), _cost(extra, dearer[dear])
        share[dear] = (spare - least) / (most - least)
    return Mixtures(picks, dearer, share)


def total(losses: Floats, picks: Ints) -> Floats:
    """Return the loss of selections. losses: (I, K) or (R, I, K); picks: (R, I); returns (R,)."""
    items = np.arange(picks.shape[-1])
    if losses.ndim == 2:
        return np.asarray(losses[items, picks].sum(axis=-1))
    return np.asarray(losses[np.arange(len(picks))[:, None], items, picks].sum(axis=-1))


def _picks(losses: Floats, extra: Floats, prices: Floats) -> Ints:
    """Return the best choice of every item at each problem's price; of equal ones, the first. (R, I)."""
    return np.asarray((losses + prices[:, None, None] * extra).argmin(axis=2))


def _cost(extra: Floats, picks: Ints) -> Floats:
    return np.asarray(extra[np.arange(len(extra)), picks].sum(axis=-1))


def _prices(losses: Floats, extra: Floats, spare: float) -> tuple[Floats, Floats]:
    """Return a price that is too low and one that fits, next to each other, for problems where price 0 does not."""
    # Twice the most that any cost could save: where every item takes its cheapest choice.
    highest = 2 * np.where(np.isfinite(losses), losses, 0.0).max() / extra[extra > 0].min()
    top = float(np.log(highest)) if highest > 0 else 0.0
    start = _bisect(losses.mean(axis=0, keepdims=True), extra, spare, np.full(1, top - SPAN), np.full(1, top))[1][0]
    low, high = np.full(len(losses), start - BRACKET), np.full(len(losses), start + BRACKET)
    high[_over(losses, extra, spare, high)] = top
    low[~_over(losses, extra, spare, low)] = top - SPAN
    low, high = _bisect(losses, extra, spare, low, high)
    low = np.where(_over(losses, extra, spare, low), np.exp(low), 0.0)  # a price below the span is as good as none
    return low, np.exp(high)


def _over(losses: Floats, extra: Floats, spare: float, log_prices: Floats) -> NDArray[np.bool_]:
    """Return which problems' best choices cost too much at their price."""
    return np.asarray(_cost(extra, _picks(losses, extra, np.exp(log_prices))) > spare)


def _bisect(losses: Floats, extra: Floats, spare: float, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Return logarithms of prices drawn together, one of which costs too much and one fits."""
    while (high - low).max() > PRECISION:
        middle = (low + high) / 2
        over = _over(losses, extra, spare, middle)
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return low, high
