"""Do the calibration texts agree about the plan? Each alone against all together.

Reads Scores of several sources and a plan made from them; writes sentences of warning. Makes no plan.

For each source its own best plan at the same stored bits is found in the linear relaxation, and what every such plan,
and the mixed one, loses by every source's losses. Sources of few sequences differ by chance: where each sequence's own
losses are known, sequences are dealt out to the sources at random, and only a ratio that none of any deal's reaches
counts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from typing_extensions import Unpack

from kvprof.allocate.candidates import Allowed
from kvprof.allocate.losses import PredictedLoss, fitting_scores
from kvprof.allocate.lp_relaxation import Floats, Ints, relax
from kvprof.allocate.problem import ExactProblem
from kvprof.analysis.bootstrap import arrays, problem_of, why_unknown
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores

NOTABLE = 1.25
"""The ratio of two predicted KLs above which sources are said to disagree."""
DEALS = 40
"""Random deals of sequences. By chance one ratio of either kind exceeds all of theirs once in forty times."""


def disagreements(
    scores: Scores,
    plan: BitPlan,
    *,
    problem: ExactProblem | None = None,
    tie: str | None = None,
    **allowed: Unpack[Allowed],
) -> list[str]:
    """Return a sentence for each notable disagreement of the sources that scores were measured on.

    scores: those that the plan was made from. tie, allowed: what it was made with, as `methods.exact` takes them; or
    problem: `problem_of` these, made before.
    Nothing where there is one source, or the scores do not hold what each of them loses.
    Raises Mismatch for scores of another model, and as `ExactProblem` does.
    """
    scores = fitting_scores(plan, scores)
    names = _names(scores)
    if len(names) < 2:
        return []
    problem = problem or problem_of(plan, scores, tie, allowed)
    source_of = _source_of(scores, len(names))
    rows = [
        [_by_source(choice, names) if source_of is None else choice.samples or () for choice in choices]
        for choices in problem.candidates
    ]
    if not all(row for choices in rows for row in choices):
        return []
    losses, costs, _ = arrays(problem, rows)
    capacity = problem.capacity(problem.limit)
    if source_of is None:
        by_all, by_source = losses[0], losses[None, 1:]
    else:
        by_all, by_source = losses.mean(axis=0), _means(losses, [source_of])
    (neglected,), (astray,) = _ratios(by_all, by_source, costs, capacity)
    if source_of is not None and max(neglected.max(), astray.max()) > NOTABLE:
        dealer, hands = random.Random(0), source_of.tolist()
        dealt = _means(losses, [np.array(dealer.sample(hands, len(hands))) for _ in range(DEALS)])
        chance = [float(ratios.max()) for ratios in _ratios(by_all, dealt, costs, capacity)]
        neglected = np.where(neglected > chance[0], neglected, 1.0)
        astray = np.where(astray > chance[1], astray, 1.0)
    return _sentences(names, neglected, astray)


def _names(scores: Scores) -> list[str]:
    """Return what the sources are called, in the order that `source_of` counts; of equal names, with their splits."""
    sources = None if scores.calibration is None else scores.calibration.sources
    if sources is None:
        losses = scores.layers[0].key.loss_increase_by_source
        return list(losses or ())
    names = [source.dataset for source in sources]
    if len(set(names)) < len(names):
        names = [f"{source.dataset} ({source.split})" for source in sources]
    return names


def _source_of(scores: Scores, sources: int) -> Ints | None:
    """Return each sequence's source, or None where the losses of single sequences are not known by source."""
    if scores.calibration is None or scores.calibration.source_of is None or why_unknown(scores) is not None:
        return None
    source_of = np.array(scores.calibration.source_of)
    samples = scores.layers[0].key.loss_increase_samples or {}
    matches = all(len(column) == len(source_of) for column in samples.values())
    return source_of if matches and set(source_of.tolist()) == set(range(sources)) else None


def _by_source(choice: PredictedLoss, names: Sequence[str]) -> tuple[float, ...]:
    """Return a format's loss by all sources together and by each; nothing where one is unknown."""
    if choice.format.is_full and choice.by_source is None:
        return (0.0,) * (1 + len(names))
    found = dict(choice.by_source or ())
    return (choice.loss, *(found[name] for name in names)) if set(names) <= set(found) else ()


def _means(losses: Floats, deals: Sequence[Ints]) -> Floats:
    """Return each source's mean losses, for several ways to deal sequences to sources.

    losses: (sequences, items, choices); deals: each sequence's source; returns (deals, sources, items, choices).
    """
    sources = range(int(deals[0].max()) + 1)
    return np.stack([[losses[deal == source].mean(axis=0) for source in sources] for deal in deals])


def _ratios(by_all: Floats, by_source: Floats, costs: Floats, capacity: int) -> tuple[Floats, Floats]:
    """Return how much worse the mixed plan is on each source than its own, and each source's plan than the mixed one.

    by_all: (items, choices); by_source: (deals, sources, items, choices).
    Returns ratios of losses, (deals, read on) and (deals, made from, read on).
    """
    deals, sources, *shape = by_source.shape
    mixed = relax(by_all[None], costs, capacity)
    alone = relax(by_source.reshape(-1, *shape), costs, capacity)
    together = np.array([[mixed.loss(losses)[0] for losses in deal] for deal in by_source])  # (deals, read on)
    columns = [alone.loss(np.repeat(by_source[:, read], sources, axis=0)) for read in range(sources)]
    apart = np.stack(columns, axis=-1).reshape(deals, sources, sources)  # (deals, made from, read on)
    return _ratio(together, np.diagonal(apart, axis1=1, axis2=2)), _ratio(apart, together[:, None, :])


def _ratio(losses: Floats, least: Floats) -> Floats:
    """Return losses over others; of nothing over nothing, 1."""
    least = np.broadcast_to(least, losses.shape)
    safe = np.where(least > 0, least, 1.0)
    return np.where(least > 0, losses / safe, np.where(losses > 0, np.inf, 1.0))


def _sentences(names: Sequence[str], neglected: Floats, astray: Floats) -> list[str]:
    """Return a sentence for each source that this plan neglects, and for each that the worst other one would.

    neglected: (sources,); astray: (made from, read on).
    """
    found = [
        f"the sources disagree: on {name} this plan is predicted to lose {ratio:.2f} times what a plan for it alone "
        f"would; if that is what the model will read, weigh it more, as in --data {name}:2"
        for name, ratio in zip(names, neglected, strict=True)
        if ratio > NOTABLE
    ]
    for read, name in enumerate(names):
        made = int(np.argmax(astray[:, read]))
        if astray[made, read] > NOTABLE:
            found.append(
                f"the sources disagree: a plan from {names[made]} alone would lose {astray[made, read]:.2f} times what "
                f"this one does on {name}, so both are needed"
            )
    return found
