"""The rules: from Scores to a BitPlan, exactly within a budget, or as two papers and plain habit have it.

Reads Scores and a limit, writes a BitPlan. Does not know how a score was measured, nor files and option names.
Every rule takes `pins` (see pins.py): a pinned tensor has the bits that its pin says and pays for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from kvprof.allocate.assemble import assemble, tensors_of
from kvprof.allocate.budget import CachedTensor, Limit, known_bits, price
from kvprof.allocate.pins import parse_pins
from kvprof.allocate.solver import TIE, solve
from kvprof.errors import InvalidFile, UsageError
from kvprof.records.document import ModelInfo
from kvprof.records.formats import TENSORS, Format, TensorName, usual_format
from kvprof.records.geometry import KVLayer
from kvprof.records.plan import BitPlan, Provenance, Quantizer, Solver, Window
from kvprof.records.scores import SCALAR_METRICS, Scores

USUAL_BITS = (1, 2, 3, 4, 6, 8)
USUAL_GROUP_SIZE = 32
USUAL_WINDOW = Window(sink_tokens=4, recent_tokens=128)
KVMIX_FRACTION = 0.2
LARGEST_GROUP = 2**31


def exact(
    scores: Scores,
    limit: Limit,
    *,
    metric: str | None = None,
    bits: Sequence[int] = USUAL_BITS,
    group_size: int = USUAL_GROUP_SIZE,
    pins: Sequence[str] = (),
    window: Window = USUAL_WINDOW,
    command: str | None = None,
) -> BitPlan:
    """Return the plan that minimises the sum over layers, keys and values, of score^2 * 4^-bits within a limit.

    The error model of arXiv 2502.15075: rounding to b bits leaves a squared error in proportion to the squared norm
    and to 4^-b. 16 bits count by the same formula, and pinned tensors count too.
    metric: one of `scores.metrics`, by default the first. bits: the widths to choose from.
    Ties go as `solver.solve` states: the cheapest plan, then more bits to keys before values, earlier layers first.
    Raises InfeasibleBudget, UsageError, and InvalidFile for scores that lack the metric.
    """
    task = _Task(scores, group_size, pins, window, command)
    metric = metric or default_metric(scores)
    formats, costs, losses, capacity = task.choices(metric, bits, limit)
    solution = solve([list(zip(*choices, strict=True)) for choices in zip(costs, losses, strict=True)], capacity)
    chosen = [forms[choice] for forms, choice in zip(formats, solution.choices, strict=True)]
    return task.plan(chosen, "exact", metric, limit, optimal=solution.optimal)


def norm_greedy(
    scores: Scores,
    limit: Limit,
    *,
    metric: str | None = None,
    bits: Sequence[int] = USUAL_BITS,
    group_size: int = USUAL_GROUP_SIZE,
    pins: Sequence[str] = (),
    window: Window = USUAL_WINDOW,
    command: str | None = None,
) -> BitPlan:
    """Return the plan of the greedy rule of arXiv 2502.15075, for the objective of `exact`.

    Every tensor starts at its fewest bits; again and again the one whose next wider width saves the most loss a unit
    of cost, of those that still fit, gets it, until none fits. A width that costs no less than a wider one is passed
    over. Gains within 1e-12 of the greatest, relatively, tie: keys before values, earlier layers first.
    Arguments and errors as for `exact`.
    """
    task = _Task(scores, group_size, pins, window, command)
    metric = metric or default_metric(scores)
    formats, costs, losses, spare = task.choices(metric, bits, limit)
    ladders = [
        [rung for rung in range(len(prices)) if all(prices[rung] < wider for wider in prices[rung + 1 :])]
        for prices in costs
    ]
    spare -= sum(prices[ladder[0]] for prices, ladder in zip(costs, ladders, strict=True))
    height = [0] * len(ladders)
    while True:
        steps = []
        for item, ladder in enumerate(ladders):
            if height[item] + 1 < len(ladder):
                now, after = ladder[height[item] : height[item] + 2]
                added = costs[item][after] - costs[item][now]
                if added <= spare:
                    steps.append(((losses[item][now] - losses[item][after]) / added, item, added))
        if not steps:
            break
        greatest = max(gain for gain, _, _ in steps)
        _, item, added = next(step for step in steps if step[0] >= greatest * (1 - TIE))
        height[item] += 1
        spare -= added
    chosen = [forms[ladder[rung]] for forms, ladder, rung in zip(formats, ladders, height, strict=True)]
    return task.plan(chosen, "norm-greedy", metric, limit)


def kvmix(
    scores: Scores,
    *,
    top_fraction: str | float = KVMIX_FRACTION,
    group_size: int = USUAL_GROUP_SIZE,
    pins: Sequence[str] = (),
    window: Window = USUAL_WINDOW,
    command: str | None = None,
) -> BitPlan:
    """Return the plan of KVmix (arXiv 2506.08018): more bits for the layers of the greatest gradient norm.

    Keys and values are ranked apart by `gradient_norm`; the top floor(top_fraction * layers) get 3 bits for keys and
    4 for values, the rest 2. Of equal norms, the earlier layer ranks first. It knows no budget.
    top_fraction: from 0 to 1, taken as the decimal number it is written as.
    Raises UsageError for a fraction outside, InvalidFile for scores without gradient norms.
    """
    task = _Task(scores, group_size, pins, window, command)
    try:
        fraction = Fraction(str(top_fraction))
    except ValueError:
        fraction = Fraction(-1)
    if not 0 <= fraction <= 1:
        raise UsageError(f"a top fraction of {top_fraction} is not between 0 and 1.\n  Try {KVMIX_FRACTION}.")
    score_of = dict(zip(task.tensors, task.scores_of("gradient_norm"), strict=True))
    wide: dict[TensorName, int] = {"key": 3, "value": 4}
    bits_of: dict[CachedTensor, int] = {}
    for name in TENSORS:
        layers = [tensor for tensor in task.tensors if tensor.name == name]  # ascending, and sorting is stable
        ranked = sorted(layers, key=score_of.__getitem__, reverse=True)
        top = math.floor(fraction * len(ranked))
        bits_of |= {tensor: wide[name] if rank < top else 2 for rank, tensor in enumerate(ranked)}
    chosen = [task.format(tensor, bits_of[tensor]) for tensor in task.tensors]
    return task.plan(chosen, "kvmix", "gradient_norm")


def uniform(
    scores: Scores,
    bits_key: int,
    bits_value: int,
    *,
    metric: str | None = None,
    group_size: int = USUAL_GROUP_SIZE,
    pins: Sequence[str] = (),
    window: Window = USUAL_WINDOW,
    command: str | None = None,
) -> BitPlan:
    """Return the plan that gives all keys one width and all values another.

    metric: fills the plan's objective, for comparison; it changes no bits.
    Raises UsageError for an unknown width.
    """
    task = _Task(scores, group_size, pins, window, command)
    (key,), (value,) = known_bits([bits_key]), known_bits([bits_value])
    chosen = [task.format(tensor, key if tensor.name == "key" else value) for tensor in task.tensors]
    return task.plan(chosen, "uniform", metric)


def default_metric(scores: Scores) -> str:
    """Return the metric to plan by when none is named: the first that every layer has, else that any layer has.

    The latter will not do, but the error then names the layer that lacks it.
    """
    partly = (
        metric
        for metric in SCALAR_METRICS
        if any(getattr(entry.tensor(name), metric) is not None for entry in scores.layers for name in TENSORS)
    )
    return next(iter(scores.metrics), next(partly, SCALAR_METRICS[0]))


class _Task:
    """What all rules share: the tensors to plan, in the order that ties favour, and how a plan is put together."""

    def __init__(
        self, scores: Scores, group_size: int, pins: Sequence[str], window: Window, command: str | None
    ) -> None:
        if not 1 <= group_size <= LARGEST_GROUP:
            raise UsageError(f"a group size of {group_size} does not exist; try {USUAL_GROUP_SIZE}.")
        self.scores = scores
        self.group_size = group_size
        self.window = window
        self.command = command
        self.tensors = _planned_tensors(scores)
        self.pinned = parse_pins(pins, self.tensors)

    def format(self, tensor: CachedTensor, bits: int) -> Format:
        """Return the usual format of a tensor at some bits, or at those that its pin says."""
        bits = self.pinned.get((tensor.layer, tensor.name), bits)
        return usual_format(tensor.name, bits, self.group_size, tensor.head_dim)

    def candidates(self, bits: Sequence[int]) -> list[list[Format]]:
        """Return each tensor's formats to choose from, narrowest first: a single one where it is pinned."""
        widths = known_bits(bits)
        return [
            [self.format(tensor, width) for width in (widths[:1] if self._is_pinned(tensor) else widths)]
            for tensor in self.tensors
        ]

    def choices(
        self, metric: str, bits: Sequence[int], limit: Limit
    ) -> tuple[list[list[Format]], list[list[int]], list[list[float]], int]:
        """Return each tensor's candidate formats, their costs and their losses, and the capacity for all costs."""
        formats = self.candidates(bits)
        costs, capacity = price(self.tensors, formats, limit, self.window, self.scores.geometry)
        return formats, costs, _losses(self.scores_of(metric), formats), capacity

    def scores_of(self, metric: str) -> list[float]:
        """Return the score of each tensor to plan."""
        found = {(layer, name): score for layer, name, score in self.scores.metric(metric)}
        return [found[tensor.layer, tensor.name] for tensor in self.tensors]

    def plan(
        self,
        chosen: Sequence[Format],
        method: str,
        metric: str | None,
        limit: Limit | None = None,
        optimal: bool = False,
    ) -> BitPlan:
        """Return the plan that stores each tensor in its chosen format."""
        scores, geometry = self.scores, self.scores.geometry
        return assemble(
            self.tensors,
            chosen,
            model=scores.model or ModelInfo(num_layers=geometry.num_layers if geometry else len(scores.layers)),
            geometry=geometry,
            quantizer=Quantizer(),
            window=self.window,
            solver=Solver(
                method=method,
                metric=metric,
                objective=None if metric is None else _objective(metric, self.scores_of(metric), chosen),
                optimal=optimal,
            ),
            provenance=Provenance(scores=scores.digest, command=self.command),
            limit=limit,
        )

    def _is_pinned(self, tensor: CachedTensor) -> bool:
        return (tensor.layer, tensor.name) in self.pinned


def _planned_tensors(scores: Scores) -> list[CachedTensor]:
    """Return the tensors of every layer to plan, in the order that ties favour."""
    if scores.geometry is None:
        shapes: dict[int, KVLayer | None] = {entry.layer: None for entry in scores.layers}
    else:
        shapes = {shape.layer: shape for shape in scores.geometry.planned}
    if not shapes:
        raise InvalidFile("every layer of this model is skipped, so there is nothing to give bits to.")
    return tensors_of(shapes)


def _losses(scores: Sequence[float], formats: Sequence[Sequence[Format]]) -> list[list[float]]:
    """Return score^2 * 4^-bits of each candidate; scores are taken relative to the greatest, so none overflows."""
    greatest = max(scores) or 1.0
    return [
        [(score / greatest) ** 2 * 4.0**-form.bits for form in candidates]
        for score, candidates in zip(scores, formats, strict=True)
    ]


def _objective(metric: str, scores: Sequence[float], chosen: Sequence[Format]) -> float:
    """Return the sum of score^2 * 4^-bits."""
    objective = math.fsum(score * score * 4.0**-form.bits for score, form in zip(scores, chosen, strict=True))
    if not math.isfinite(objective):
        raise InvalidFile(f"{metric} reaches {max(scores)}, too large to square; rescale the scores.")
    return objective
