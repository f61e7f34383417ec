"""What to doubt of a new plan: how much other sequences would have changed, and whether the texts agree.

Reads Scores and the plan made from them; writes a Stability and remarks. Makes no plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Unpack

from kvprof.allocate.candidates import Allowed
from kvprof.allocate.losses import kl_factor
from kvprof.analysis.bootstrap import problem_of, why_unknown
from kvprof.analysis.source_agreement import disagreements
from kvprof.analysis.stability import stability
from kvprof.records.plan import BitPlan
from kvprof.records.scores import LOSS_INCREASE, Scores
from kvprof.records.stability import Stability


@dataclass(frozen=True)
class Uncertainty:
    """What is known of a plan's reliability; nothing of a plan that `loss_increase` did not choose."""

    stability: Stability | None = None
    remarks: tuple[str, ...] = ()
    """Why the stability is unknown, and where the sources of the scores disagree."""
    best_pair: tuple[str, float] | None = None
    """The best uniform pair that stores no more, as `int3g64/rot2`, and its predicted KL, in nats a token."""


def uncertainty_of(
    scores: Scores,
    plan: BitPlan,
    *,
    tie: str | None = None,
    context: int | None = None,
    batch: int = 1,
    **allowed: Unpack[Allowed],
) -> Uncertainty:
    """Return what to doubt of a plan that was just made from scores.

    tie, allowed: what it was made with, as `methods.exact` takes them. context, batch: where it had bytes to spend.
    Raises as `ExactProblem` does.
    """
    solver = plan.solver
    if solver is None or solver.method != "exact" or solver.metric != LOSS_INCREASE or solver.target is not None:
        return Uncertainty()  # resampling solves without a runtime's constraints
    scores = scores.leaving(plan.reasons)
    unknown = why_unknown(scores)
    problem = problem_of(plan, scores, tie, allowed, context, batch)
    pair = problem.best_pair(problem.capacity(problem.limit))
    return Uncertainty(
        stability=None if unknown else stability(scores, plan, problem=problem),
        remarks=(
            *([f"how stable the plan is cannot be told: {unknown}"] if unknown else []),
            *disagreements(scores, plan, problem=problem, tie=tie, **allowed),
        ),
        best_pair=None if pair is None else (pair[0], kl_factor(scores) * pair[1]),
    )
