"""What candidates cost, as integers of one common unit, so that a plan meets a limit exactly or not at all.

Reads tensors with their candidate formats, and a unit; writes integer costs, and what they mean as bits or bytes.
Does not know losses, nor how a plan is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvprof.allocate.budget import CachedTensor, Limit, Unit
from kvprof.errors import InfeasibleBudget, UsageError
from kvprof.records.formats import CODE_BITS, FULL_BITS, Format
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import Window, tensor_bytes


@dataclass(frozen=True)
class Prices:
    """The cost of each candidate format of each tensor."""

    costs: list[list[int]]
    unit: Unit
    denominator: int
    """Units of cost in a bit of one element, or in a byte."""
    share: int
    """Elements that a limit in bits is averaged over; 1 for bytes."""
    offset: int
    """Bytes that layers which no plan covers, and indexers, take in any case; 0 for bits."""

    @property
    def reach(self) -> tuple[Fraction, Fraction]:
        """What the cheapest plan and the dearest cost, where each tensor is chosen for by itself."""
        low, high = (self.amount(sum(map(end, self.costs))) for end in (min, max))
        return low, high

    def capacity(self, amount: Fraction) -> int:
        """Return what all costs together may be under a limit."""
        return math.floor((amount * self.share - self.offset) * self.denominator)

    def amount(self, cost: int) -> Fraction:
        """Return what a total cost is, in bits an element or in bytes."""
        return (Fraction(cost, self.denominator) + self.offset) / self.share


def price(
    tensors: Sequence[CachedTensor],
    formats: Sequence[Sequence[Format]],
    limit: Limit,
    window: Window,
    geometry: CacheGeometry | None,
) -> Prices:
    """Return what each candidate format of each tensor costs, in the limit's unit; its amount does not matter here.

    In bits, a tensor costs its format's bits times its cached width; in bytes, exactly what `BitPlan.bytes_at` counts.
    Raises UsageError for a limit in bytes without a geometry.
    """
    pairs = list(zip(tensors, formats, strict=True))
    if limit.unit == "bytes":
        if geometry is None:
            raise UsageError(
                "these scores carry no geometry, so the bytes of a plan are unknown.\n"
                "  Give --budget in bits per element, or take scores measured by kvprof norms or kvprof gradients."
            )
        shapes, element_bytes, context = geometry.layers, geometry.element_bytes, limit.context
        in_bytes = [
            [
                limit.batch * tensor_bytes(form, shapes[tensor.layer], tensor.name, window, element_bytes, context)
                for form in candidates
            ]
            for tensor, candidates in pairs
        ]
        planned = {tensor.layer for tensor in tensors}
        skipped = [shape for shape in shapes if shape.layer not in planned]
        fixed = sum(shape.tokens_kept(context) * geometry.bytes_per_token(shape) for shape in skipped)
        fixed += sum(geometry.indexer_bytes(shapes[layer], context) for layer in planned)
        fixed += geometry.state_bytes(context)
        return Prices(in_bytes, limit.unit, denominator=1, share=1, offset=limit.batch * fixed)
    bits_of: dict[tuple[Format, int | None], Fraction] = {}  # tensors have formats in common, and fractions are slow

    def bits(form: Format, head_dim: int | None) -> Fraction:
        if (form, head_dim) not in bits_of:
            nominal = limit.unit == "nominal"
            bits_of[form, head_dim] = Fraction(form.bits) if nominal else form.stored_bits(head_dim)
        return bits_of[form, head_dim]

    found = [[bits(form, tensor.head_dim) for form in candidates] for tensor, candidates in pairs]
    denominator = math.lcm(*(cost.denominator for cost in bits_of.values()))
    costs = [
        [tensor.width * cost.numerator * (denominator // cost.denominator) for cost in row]
        for (tensor, _), row in zip(pairs, found, strict=True)
    ]
    return Prices(costs, limit.unit, denominator, share=sum(tensor.width for tensor in tensors), offset=0)


def check_reach(
    limit: Limit,
    cheapest: Fraction,
    dearest: Fraction,
    formats: Sequence[Sequence[Format]],
    scored: bool = False,
    narrowed: Sequence[str] = (),
    option: str | None = None,
    target: str | None = None,
) -> None:
    """Raise InfeasibleBudget where the cheapest plan costs more than the limit or the dearest less.

    cheapest, dearest: in the limit's unit. formats: each tensor's candidates. scored: whether they are what scores
    speak of, rather than widths at one group size. narrowed: the options that left choices out. option: that the
    limit was given with. target: the runtime whose constraints the plans are within.
    """
    if cheapest <= limit.amount <= dearest:
        return
    below = limit.amount < cheapest
    low, high = written(cheapest, limit.unit, math.ceil), written(dearest, limit.unit, math.floor)
    if limit.unit == "bytes":
        asked, usual = f"{limit.amount} bytes of cache", "--memory"
    else:
        asked, usual = f"{float(limit.amount):.15g} {limit.unit} bits per element", "--budget"
    whose = "these formats" if target is None else target
    verdict = f"is below what {whose} can reach" if below else f"is more than {whose} can use"
    ways = [f"{option or usual} {low if below else high}"]
    if not scored:
        narrowed = [one for one in narrowed if one not in ("--bits", "--group-size")]  # said there, with a value
        ways += _for_widths(limit, below, formats)
    elif not narrowed and target is None:
        ways += _for_scored(below, formats)
    if narrowed:
        ways.append(f"loosen {' or '.join(narrowed)}")
    if target is not None:
        ways.append("choose another --target")
    raise InfeasibleBudget(f"{asked} {verdict}.\n  cheapest plan: {low}    dearest: {high}\n  try {', or '.join(ways)}")


def written(amount: Fraction, unit: Unit, rounded: Callable[[Fraction], int]) -> str:
    """Return an end of the feasible range as an option's value, rounded so that it lies within."""
    if unit == "bytes":
        return f"{rounded(amount)}B"
    return f"{rounded(amount * 10_000) / 10_000:.4f}".rstrip("0").rstrip(".")


def _for_widths(limit: Limit, below: bool, formats: Sequence[Sequence[Format]]) -> list[str]:
    """Return what else would make a limit feasible where any width can be had."""
    ways = []
    widths = [form.bits for candidates in formats for form in candidates]
    if below:
        if min(widths) > min(CODE_BITS):
            ways.append(f"allow --bits below {min(widths)}")
        if limit.unit != "nominal" and min(widths) < FULL_BITS:
            ways.append("take a larger --group-size")
    elif max(widths) < FULL_BITS and not all(len(candidates) == 1 for candidates in formats):
        ways.append(f"allow --bits above {max(widths)}")
    return ways


def _for_scored(below: bool, formats: Sequence[Sequence[Format]]) -> list[str]:
    """Return what else would make a limit feasible where formats must have been scored."""
    if below:
        return ["allow cheaper formats (score them with `kvprof gradients --formats`)"]
    if any(form.is_full for candidates in formats for form in candidates):
        return []
    return [f"name {FULL_BITS} among the --bits"]
