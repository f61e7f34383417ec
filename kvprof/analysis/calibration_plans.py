"""What calibrating starts from: plans to measure, and what their scores say of them before any factor.

Reads Scores and plans, or makes plans where there are none; does not measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from kvprof.allocate.budget import Limit, stored_bits_per_element
from kvprof.allocate.losses import entries_of, planned_tensors
from kvprof.allocate.prediction import Prediction, predict, predicted_kl
from kvprof.allocate.problem import ExactProblem
from kvprof.errors import InvalidFile, Mismatch
from kvprof.records.audit import PredictedPlan
from kvprof.records.plan import BitPlan
from kvprof.records.scores import LOSS_INCREASE, Scores

BUDGETS = (Fraction("2.5"), Fraction("3.5"))
"""Stored bits of the plans to measure where a user names none: one of large errors, one of small ones."""


def usual_plans(scores: Scores) -> dict[str, BitPlan]:
    """Return the best plans by the scores at BUDGETS, by name; where those cannot be, within what the formats reach.

    Raises as `methods.exact` does for scores without `loss_increase`.
    """
    problem = ExactProblem(scores, Limit(BUDGETS[0], "stored"), LOSS_INCREASE, {})
    low, high = problem.prices.amount(problem.cheapest), problem.prices.amount(problem.dearest)
    budgets = [budget for budget in BUDGETS if low <= budget <= high]
    if len(budgets) < 2:
        budgets = [low + (high - low) * share / 4 for share in (1, 3)]
    plans = {}
    for budget in budgets:
        limit = Limit(budget, "stored")
        plan = problem.plan(problem.best(problem.capacity(limit)), limit)
        plans[f"best within {float(budget):.4g} bits"] = plan
    return plans


def predict_plans(scores: Scores, plans: Mapping[str, BitPlan]) -> list[PredictedPlan]:
    """Return what the scores say of each plan, no factor in it.

    Raises InvalidFile, naming plan and tensor, for a format that was not scored; Mismatch for scores of another model.
    """
    plain = scores.model_copy(update={"kl_calibration": None})
    found = []
    for name, plan in plans.items():
        try:
            prediction = predict(plan, plain)
        except Mismatch as error:
            raise Mismatch(f"{name}: {error}") from None
        except InvalidFile as error:
            raise InvalidFile(f"{name}: {error}\n  Scores that have it can be named with --scores.") from None
        if prediction.kl_nats is None:
            raise InvalidFile(_unscored(name, prediction))
        tensors = planned_tensors(plan, scores.geometry)
        whole = predicted_kl(plan, plain) or prediction.kl_nats
        more = whole / prediction.kl_nats if prediction.kl_nats else 1.0
        found.append(
            PredictedPlan(
                name=name,
                plan=plan,
                stored_bits=float(stored_bits_per_element(tensors, entries_of(plan, tensors))),
                predicted_nats=whole,
                samples=None
                if prediction.by_sequence is None
                else tuple(more * nats for nats in prediction.by_sequence),
            )
        )
    return found


def _unscored(name: str, prediction: Prediction) -> str:
    tensor, entry = prediction.unscored[0]
    others = len(prediction.unscored) - 1
    more = f", nor {others} other tensors' format" if others else ""
    recent = " with a recent_fraction" if entry.recent_fraction else ""
    return (
        f"{name}: {entry.name}{recent} was not scored for the {tensor.word} of layer {tensor.layer}{more}.\n"
        f"  Score it with kvprof gradients --formats {tensor.name}:{entry.name},... or name other plans."
    )
