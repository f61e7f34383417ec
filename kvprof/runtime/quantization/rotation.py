"""What rotated formats are made of: a Hadamard rotation with random signs, and a codebook for the normal it leads to.

Plain numbers of a head dimension, a seed and a width of codes. Does not know keys, values, nor scales.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@functools.cache
def lloyd_max_levels(bits: int) -> Tensor:
    """Return the 2^bits reproduction levels of least squared error for a standard normal, ascending, float64.

    Each level is the mean of the normal between the midpoints to its neighbours (Lloyd 1982, Max 1960). Newton's method
    on the positive half; the other half mirrors it. 1 bit: 0.7979; 2 bits: 0.4528, 1.5104.
    """
    half = 2 ** (bits - 1)
    # At many levels they lie like the quantiles of a normal of variance 3 (Panter and Dite 1951): a start nearby.
    position = (torch.arange(half, dtype=torch.float64) + half + 0.5) / (2 * half)
    levels = math.sqrt(3) * torch.special.ndtri(position)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(100):
        middle = (levels[1:] + levels[:-1]) / 2
        low, high = torch.cat([torch.zeros(1, dtype=torch.float64), middle]), torch.cat([middle, infinity])
        density_low, density_high = (torch.exp(-edge.square() / 2) / math.sqrt(2 * math.pi) for edge in (low, high))
        mass = (torch.special.erfc(low / math.sqrt(2)) - torch.special.erfc(high / math.sqrt(2))) / 2
        mean = (density_low - density_high) / mass
        # How a cell's mean moves with its edges; an edge moves by half of what either neighbour does.
        by_low = density_low * (mean - low) / mass / 2
        by_high = density_high[:-1] * (high - mean)[:-1] / mass[:-1] / 2
        by_low[0] = 0.0  # the edge at 0 stays
        jacobian = torch.diag(1 - by_low) - torch.diag(by_low[1:], -1) - torch.diag(by_high, 1)
        jacobian[range(half - 1), range(half - 1)] -= by_high
        step = torch.linalg.solve(jacobian, levels - mean)
        while bool(((levels - step).diff() <= 0).any()) or bool(levels[0] <= step[0]):
            step = step / 2  # the levels stay ascending and positive
        levels = levels - step
        if float(step.abs().max()) < 1e-14:
            break
    return torch.cat([-levels.flip(0), levels])


@functools.cache
def level_edges(bits: int) -> Tensor:
    """Return what lies between neighbouring levels, where a number's code changes: (2^bits - 1,), float64."""
    levels = lloyd_max_levels(bits)
    return (levels[1:] + levels[:-1]) / 2


@dataclass(frozen=True)
class LevelCells:
    """The real line in cells of one width, with at most one edge in each: a code is one look-up and one comparison.

    starts_at: of the first cell. cells_per_unit: their number in an interval of 1. codes: the code of what lies before
    a cell's edge, (cells,), uint8. edges: that edge, or where there is none the next one, (cells,), float64.
    """

    starts_at: float
    cells_per_unit: int
    codes: Tensor
    edges: Tensor

    def codes_of(self, numbers: Tensor) -> Tensor:
        """Return the code of each number, uint8; of what is no number, any."""
        last = len(self.codes) - 1
        place = torch.add(-self.starts_at * self.cells_per_unit, numbers, alpha=self.cells_per_unit)
        cells = place.clamp_(0, last).int().clamp_(0, last).flatten()  # an integer made of NaN may be any
        codes, edges = self.codes.to(numbers.device), self.edges.to(numbers.device, numbers.dtype)
        beyond = numbers.flatten() > edges.index_select(0, cells)
        return codes.index_select(0, cells).add_(beyond).view(numbers.shape)


@functools.cache
def level_cells(bits: int) -> LevelCells:
    """Return cells so small that each has at most one of the edges between neighbouring levels."""
    edges = level_edges(bits)
    slack = 1e-5  # of a number's place, which is rounded
    reach = math.ceil(float(edges[-1])) + 1
    per_unit = 8
    while True:
        starts = torch.arange(-reach * per_unit, reach * per_unit, dtype=torch.float64) / per_unit
        before = torch.bucketize(starts - slack, edges)
        if bool((torch.bucketize(starts + 1 / per_unit + slack, edges) - before <= 1).all()):
            beyond_all = torch.tensor([math.inf], dtype=torch.float64)
            return LevelCells(-float(reach), per_unit, before.to(torch.uint8), torch.cat([edges, beyond_all])[before])
        per_unit *= 2


@functools.cache
def exact_levels(bits: int, head_dim: int) -> Tensor:
    """Return the Lloyd-Max levels, rounded so that float32 holds any sum of `head_dim` of them exactly.

    With 24 bits of which a sum needs log2(head_dim) and the largest level its own, 17 are left behind the point for 2
    bits and 64 channels: 4e-6 at most is lost. In return the rotation is exact, so that what a token comes back as
    depends on no order of summing: on no batch, no block and no device. TF32, which torch leaves off unless it is asked
    for, would cut the levels short.
    """
    levels = lloyd_max_levels(bits)
    places = 24 - math.ceil(math.log2(head_dim * float(levels[-1])))
    return (levels * 2.0**places).round() / 2.0**places


@functools.lru_cache(maxsize=64)
def rotation(head_dim: int, seed: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return H diag(s), entries 1 and -1: Sylvester's Hadamard matrix, its columns with the signs that the seed draws.

    seed: None draws none, and all are 1.

    x diag(s) H / sqrt(D) rotates, and y H diag(s) / sqrt(D) rotates back.
    """
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < head_dim:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signed = hadamard if seed is None else hadamard * rotation_signs(head_dim, seed)
    return signed.to(device=device, dtype=dtype)


def rotation_signs(head_dim: int, seed: int) -> Tensor:
    """Return the signs s that a rotation begins with, (D,), int64."""
    return torch.randint(0, 2, (head_dim,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
