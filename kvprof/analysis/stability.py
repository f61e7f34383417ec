"""Would other calibration sequences have made another plan, and a better one? A bootstrap over sequences.

Reads Scores with each sequence's own losses, and a plan made from them; writes a Stability. Makes no plan.

Each resample's best plan at the same stored bits, in the linear relaxation, is compared with that of all sequences. By
the bootstrap's principle a resample is to the sequences what they are to all text of that kind: as much as its plan is
worse than theirs, by their losses, theirs is worse than the best. A tensor that flips between two formats of nearly the
same worth is no harm and hardly counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil, floor

import numpy as np
from typing_extensions import Unpack

from kvprof.allocate.assemble import tensors_of
from kvprof.allocate.budget import Limit, bit_limit
from kvprof.allocate.candidates import Allowed
from kvprof.allocate.costs import price, written
from kvprof.allocate.losses import fitting_scores
from kvprof.allocate.lp_relaxation import Floats, relax
from kvprof.allocate.prediction import predict
from kvprof.allocate.problem import ExactProblem
from kvprof.analysis.bootstrap import Sampled, plain_problem, problem_of, why_unknown, with_samples
from kvprof.errors import InfeasibleBudget, UsageError
from kvprof.records.formats import Format, TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import USUAL_WINDOW, BitPlan
from kvprof.records.scores import LOSS_INCREASE, Scores
from kvprof.records.stability import Stability

RESAMPLES = 100
STABLE_REGRET = 0.05
"""The share of predicted KL that a stable plan loses at most, in 90 % of resamples, by being made from so few."""
MOST_REGRET = 1e6
"""What a regret counts as where the best plan loses next to nothing: a number, as records need."""
FEWEST_SEQUENCES = 4
"""Of each source; fewer make resamples that are too much alike to be believed."""
BUDGETS = (Fraction("2.5"), Fraction("3"), Fraction("3.5"))
"""Stored bits at which scores are to make stable plans where no budget is named."""


def stability(
    scores: Scores,
    plan: BitPlan,
    *,
    problem: ExactProblem | None = None,
    tie: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    **allowed: Unpack[Allowed],
) -> Stability | None:
    """Return how much of a plan other sequences of the same text would have changed.

    scores: those that the plan was made from. tie, allowed: what it was made with, as `methods.exact` takes them; or
    problem: `problem_of` these, made before.
    None where `why_unknown` has a reason, or a format of the plan was not scored.
    Raises Mismatch for scores of another model, and as `ExactProblem` does.
    """
    scores = fitting_scores(plan, scores)
    if why_unknown(scores) or predict(plan, scores).unscored:
        return None
    losses = with_samples(problem or problem_of(plan, scores, tie, allowed), scores)
    weights = losses.drawn(resamples, seed)
    changed, regret = _against_all(losses, weights)
    return Stability(
        resamples=resamples,
        sequences=losses.sequences,
        tensors=2 * len(plan.layers),
        changed_mean=float(changed.mean()),
        changed_p90=_quantile(changed, 0.9),
        regret_p90=_quantile(regret, 0.9),
    )


def is_stable(found: Stability, threshold: float = STABLE_REGRET) -> bool:
    """Whether more sequences would hardly have made a better plan: 90 % of resamples stay within this regret.

    That tensors flip does not count, nor that the predicted KL itself is uncertain: neither makes the plan worse.
    """
    return found.regret_p90 <= threshold


def stable_at(scores: Scores, limit: Limit | None = None, *, seed: int = 0) -> bool:
    """Whether the scores have seen enough sequences: a plan made from them is stable, as `is_stable` has it.

    limit: a budget in stored bits; without one, each of BUDGETS that the scored formats reach, or where they reach none
    the middle of what they do. False where `why_unknown` has a reason, or a source has less than FEWEST_SEQUENCES.
    It costs about a tenth of a second a budget. Raises InfeasibleBudget for a limit that no plan meets, UsageError for
    one in other units.
    """
    if why_unknown(scores) is not None or _fewest(scores) < FEWEST_SEQUENCES:
        return False
    for amount in _reachable(scores) if limit is None else [limit.amount]:
        losses = with_samples(plain_problem(scores, Limit(amount, "stored"), None, None, {}), scores)
        _, regret = _against_all(losses, losses.drawn(RESAMPLES, seed))
        if _quantile(regret, 0.9) > STABLE_REGRET:
            return False
    return True


class StableAt:
    """Whether scores have seen enough sequences for plans of certain budgets, as a question of scores."""

    def __init__(self, budgets: Sequence[str | float]) -> None:
        """budgets: stored bits an element; with none, `stable_at` asks at its own. Raises UsageError for no number."""
        self._limits: list[Limit | None] = [bit_limit(budget, "stored") for budget in budgets]

    def __call__(self, scores: Scores) -> bool:
        """Return whether they have; raises InfeasibleBudget for a budget that the scored formats cannot meet."""
        return all(stable_at(scores, limit) for limit in self._limits or [None])

    def check(self, geometry: CacheGeometry, formats: Mapping[tuple[int, TensorName], Sequence[Format]]) -> None:
        """Raise before anything is measured what would stand in the way of plans afterwards.

        formats: that will be scored, of each layer and tensor. Raises UsageError where a tensor will have none,
        InfeasibleBudget for a budget that no plan of these formats can have.
        """
        tensors = tensors_of({layer.layer: layer for layer in geometry.planned})
        choices = [formats.get((tensor.layer, tensor.name), ()) for tensor in tensors]
        for tensor, forms in zip(tensors, choices, strict=True):
            if not forms:
                raise UsageError(
                    f"--until-stable looks at plans, and no format is predicted for the {tensor.word} of layer "
                    f"{tensor.layer}.\n  Name --formats for keys and values."
                )
        for limit in filter(None, self._limits):
            low, high = price(tensors, choices, limit, USUAL_WINDOW, geometry).reach
            if not low <= limit.amount <= high:
                raise InfeasibleBudget(
                    f"--stable-at {float(limit.amount):g}: plans of these formats have {written(low, 'stored', ceil)} "
                    f"to {written(high, 'stored', floor)} stored bits an element.\n  Name a budget between, or others "
                    "of --formats."
                )


def _against_all(sampled: Sampled, weights: Floats) -> tuple[Floats, Floats]:
    """Return for each resample the tensors that change their format, and the regret: both (resamples,)."""
    by_all = sampled.mean(sampled.even)
    best = relax(by_all, sampled.costs, sampled.capacity)
    drawn = relax(sampled.mean(weights), sampled.costs, sampled.capacity)
    least = float(best.loss(by_all)[0])
    losses = drawn.loss(by_all[0])
    # The plan of all sequences is the best by their losses, rounding aside.
    ratio = losses / least if least > 0 else np.where(losses > 0, np.inf, 1.0)
    regret = np.clip(ratio - 1, 0.0, MOST_REGRET)
    return sampled.changed(drawn.picks, best.picks).astype(np.float64), regret


def _quantile(numbers: Floats, share: float) -> float:
    """Return what a share of the numbers does not exceed, between two of them in proportion."""
    ranked = np.sort(numbers)  # np.quantile would import numpy.ma for it
    return float(np.interp(share * (len(ranked) - 1), np.arange(len(ranked)), ranked))


def _fewest(scores: Scores) -> int:
    """Return the sequences of the source that has the fewest, or all where sources are unknown."""
    samples = scores.layers[0].key.loss_increase_samples or {}
    number = len(next(iter(samples.values()), ()))
    source_of = None if scores.calibration is None else scores.calibration.source_of
    return min(Counter(source_of).values()) if source_of else number


def _reachable(scores: Scores) -> list[Fraction]:
    problem = ExactProblem(scores, Limit(BUDGETS[0], "stored"), LOSS_INCREASE, {})
    low, high = problem.prices.amount(problem.cheapest), problem.prices.amount(problem.dearest)
    return [budget for budget in BUDGETS if low <= budget <= high] or [(low + high) / 2]
