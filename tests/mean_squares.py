"""The loss that effects have where each position is taken by itself: what the second order of one position says."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprof.profile.loss_increase import Effects


def mean_squares(effects: Effects) -> dict[tuple[int, str, str], Tensor]:
    """Return half the mean square of each sequence's effects, in nats a token: (B,) of every key."""
    return {
        key: torch.stack([0.5 * positions_N.square().sum() / len(positions_N) for positions_N in rows])
        for key, rows in effects.items()
    }
