"""The rules: from Scores to a BitPlan, exactly within a budget, or as two papers and plain habit have it.

Reads Scores and a limit, writes a BitPlan. Does not know how a score was measured, nor files and option names.
Every rule takes `pins` (see pins.py): a pinned tensor has what its pin says and pays for it. The window is by default
what the scores were measured with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from typing_extensions import Unpack

from kvprof.allocate.budget import CachedTensor, Limit
from kvprof.allocate.candidates import USUAL_GROUP_SIZE, Allowed, candidates_of, check_group_size, narrowing
from kvprof.allocate.costs import check_reach, price
from kvprof.allocate.pareto import TIE
from kvprof.allocate.pins import parse_pins
from kvprof.allocate.problem import ExactProblem
from kvprof.allocate.task import PlanTask
from kvprof.errors import UsageError
from kvprof.records.formats import TENSORS, Format, TensorName, format_named, known_bits, usual_format
from kvprof.records.plan import BitPlan, Window
from kvprof.records.scores import LOSS_INCREASE, METRICS, Scores

GREEDY_METRICS = ("spectral_norm", "frobenius_norm", "gradient_norm")
"""What `norm_greedy` goes by where nothing is named, the first that the scores have: its paper is about norms."""
KVMIX_FRACTION = 0.2
KVMIX_KEY_GROUP = 11
"""Tokens whose 3-bit keys share a scale in KVmix, which packs eleven codes into 32 bits (the last one has two)."""


def exact(
    scores: Scores,
    limit: Limit,
    *,
    metric: str | None = None,
    tie: str | None = None,
    window: Window | None = None,
    **allowed: Unpack[Allowed],
) -> BitPlan:
    """Return the plan that loses the least within a limit.

    By `loss_increase`, the sum over layers, keys and values, of the nats that were scored for the chosen formats. By a
    norm or a gradient norm, the sum of score^2 * 4^-bits, the error model of arXiv 2502.15075: rounding to b bits
    leaves a squared error in proportion to the squared norm and to 4^-b; 16 bits count by the same formula. Pinned
    tensors count too.
    metric: one of `scores.metrics`, by default the first. allowed: what may be chosen; by default all formats that were
    scored, else USUAL_BITS at USUAL_GROUP_SIZE. tie: "key-value" gives a layer's keys and values equally wide codes.
    Ties in loss go as `solver.solve` states: the cheapest plan, then more bits to keys before values, earlier layers
    first.
    Raises InfeasibleBudget, UsageError, and InvalidFile for scores that lack the metric.
    """
    problem = ExactProblem(scores, limit, metric or default_metric(scores), allowed, tie, window)
    return problem.plan(problem.best(problem.capacity(limit)), limit)


def norm_greedy(
    scores: Scores,
    limit: Limit,
    *,
    metric: str | None = None,
    window: Window | None = None,
    **allowed: Unpack[Allowed],
) -> BitPlan:
    """Return the plan of the greedy rule of arXiv 2502.15075, for the objective that `exact` has by a norm.

    Every tensor starts at its fewest bits; again and again the one whose next wider width saves the most loss a unit
    of cost, of those that still fit, gets it, until none fits. A width that costs no less than a wider one is passed
    over. Gains within 1e-12 of the greatest, relatively, tie: keys before values, earlier layers first.
    Arguments and errors as for `exact`, but that a metric must be a number a tensor.
    """
    metric = metric or default_metric(scores, GREEDY_METRICS)
    if metric == LOSS_INCREASE:
        raise UsageError(
            f"--rule norm-greedy spends by one number a tensor, and {LOSS_INCREASE} is one a format.\n"
            f"  Give --metric {GREEDY_METRICS[0]}, or spend {LOSS_INCREASE} by --rule exact."
        )
    task = PlanTask(scores, window)
    candidates = candidates_of(scores, task.tensors, metric, allowed)
    formats = [[choice.format for choice in choices] for choices in candidates]
    prices = price(task.tensors, formats, limit, task.window, scores.geometry)
    check_reach(limit, *prices.reach, formats, narrowed=narrowing(allowed))
    costs, spare = prices.costs, prices.capacity(limit.amount)
    ladders = [
        [rung for rung in range(len(row)) if all(row[rung] < wider for wider in row[rung + 1 :])] for row in costs
    ]
    spare -= sum(row[ladder[0]] for row, ladder in zip(costs, ladders, strict=True))
    height = [0] * len(ladders)
    while True:
        steps = []
        for item, ladder in enumerate(ladders):
            if height[item] + 1 < len(ladder):
                now, after = ladder[height[item] : height[item] + 2]
                added = costs[item][after] - costs[item][now]
                if added <= spare:
                    saved = candidates[item][now].loss - candidates[item][after].loss
                    steps.append((saved / added, item, added))
        if not steps:
            break
        greatest = max(gain for gain, _, _ in steps)
        _, item, added = next(step for step in steps if step[0] >= greatest * (1 - TIE))
        height[item] += 1
        spare -= added
    chosen = [forms[ladder[rung]] for forms, ladder, rung in zip(formats, ladders, height, strict=True)]
    return task.plan(chosen, task.solver("norm-greedy", metric, chosen), limit)


def kvmix(
    scores: Scores,
    *,
    top_fraction: str | float = KVMIX_FRACTION,
    group_size: int = USUAL_GROUP_SIZE,
    as_published: bool = False,
    pins: Sequence[str] = (),
    window: Window | None = None,
) -> BitPlan:
    """Return the plan of KVmix (arXiv 2506.08018): more bits for the layers of the greatest gradient norm.

    Keys and values are ranked apart by `gradient_norm`; the top floor(top_fraction * layers) get 3 bits for keys and
    4 for values, the rest 2. Of equal norms, the earlier layer ranks first. It knows no budget.
    top_fraction: from 0 to 1, taken as the decimal number it is written as. as_published: 3-bit keys have groups of
    KVMIX_KEY_GROUP whatever the others have. The paper's recent window, a share of the uncompressed tokens that shrinks
    with every step, is not modelled.
    Raises UsageError for a fraction outside, InvalidFile for scores without gradient norms.
    """
    task = PlanTask(scores, window)
    try:
        fraction = Fraction(str(top_fraction))
    except ValueError:
        fraction = Fraction(-1)
    if not 0 <= fraction <= 1:
        raise UsageError(f"a top fraction of {top_fraction} is not between 0 and 1.\n  Try {KVMIX_FRACTION}.")
    score_of = dict(zip(task.tensors, task.scores_of("gradient_norm"), strict=True))
    wide: dict[TensorName, int | str] = {"key": f"int3g{KVMIX_KEY_GROUP}" if as_published else 3, "value": 4}
    bits_of: dict[CachedTensor, int | str] = {}
    for name in TENSORS:
        layers = [tensor for tensor in task.tensors if tensor.name == name]  # ascending, and sorting is stable
        ranked = sorted(layers, key=score_of.__getitem__, reverse=True)
        top = math.floor(fraction * len(ranked))
        bits_of |= {tensor: wide[name] if rank < top else 2 for rank, tensor in enumerate(ranked)}
    chosen = _usual_formats(task, bits_of, group_size, pins)
    return task.plan(chosen, task.solver("kvmix", "gradient_norm", chosen))


def uniform(
    scores: Scores,
    key: int | str,
    value: int | str,
    *,
    metric: str | None = None,
    group_size: int = USUAL_GROUP_SIZE,
    pins: Sequence[str] = (),
    window: Window | None = None,
) -> BitPlan:
    """Return the plan that gives all keys one width or format and all values another.

    key, value: a width of codes, or a format by name, such as "rot3". metric: fills the plan's objective, for
    comparison, where it tells it of these formats; by default `loss_increase` where the scores have it. It changes no
    bits.
    Raises UsageError for an unknown width or format, or one that the heads cannot have.
    """
    task = PlanTask(scores, window)
    wanted = {"key": key, "value": value}
    for given in wanted.values():
        if isinstance(given, int):
            known_bits([given])
    chosen = _usual_formats(task, {tensor: wanted[tensor.name] for tensor in task.tensors}, group_size, pins)
    if metric is None and LOSS_INCREASE in scores.metrics:
        metric = LOSS_INCREASE
    return task.plan(chosen, task.solver("uniform", metric, chosen))


def default_metric(scores: Scores, metrics: Sequence[str] = METRICS) -> str:
    """Return the metric to plan by when none is named: the first of these that every layer has, else that any has.

    The latter will not do, but the error then names the layer that lacks it.
    """
    complete = (metric for metric in metrics if metric in scores.metrics)
    partly = (
        metric
        for metric in metrics
        if any(entry.tensor(name).has(metric) for entry in scores.layers for name in TENSORS)
    )
    return next(complete, next(partly, metrics[0]))


def _usual_formats(
    task: PlanTask, wanted: Mapping[CachedTensor, int | str], group_size: int, pins: Sequence[str]
) -> list[Format]:
    """Return each tensor's format where a rule says its bits, or a name, and a pin may say otherwise."""
    check_group_size(group_size)
    pin_of = parse_pins(pins, task.tensors)
    chosen = []
    for tensor in task.tensors:
        pin = pin_of.get((tensor.layer, tensor.name))
        given = wanted[tensor]
        if pin is not None:
            chosen.append(pin.usual(tensor, group_size))
        elif isinstance(given, int):
            chosen.append(usual_format(tensor.stored_as, given, group_size, tensor.head_dim))
        else:
            chosen.append(format_named(given, tensor.stored_as, tensor.head_dim))
    return chosen
