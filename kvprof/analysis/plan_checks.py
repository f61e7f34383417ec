"""Whole plans: the KL that scores predict of each, and what an evaluation measured.

Reads plans, Scores and Evaluations; finds a plan in an evaluation by its digest. Does not know where files lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from kvprof.allocate.prediction import predicted_kl
from kvprof.errors import KvprofError
from kvprof.records.audit import PlanCheck
from kvprof.records.evaluation import Evaluation
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores


def check_plans(
    plans: Mapping[str, BitPlan], evaluations: Sequence[Evaluation], predicting: Sequence[Scores]
) -> list[PlanCheck]:
    """Return each plan, by name, that an evaluation measured and whose KL was predicted: the fewest stored bits first.

    predicting: scores with `loss_increase`.
    """
    named: dict[str | None, dict[str, BitPlan]] = defaultdict(dict)  # by digest: copies of a plan are plans, too
    for name, plan in plans.items():
        named[plan.digest][name] = plan
    checks = []
    for evaluation in evaluations:
        split = f" ({evaluation.text.split})" if evaluation.text.split else ""
        for result in evaluation.plans:
            for name, plan in named[result.digest].items():
                predicted = _predicted(plan, predicting)
                if predicted is None:
                    continue
                checks.append(
                    PlanCheck(
                        name=name,
                        digest=plan.digest,
                        stored_bits=result.stored_bits,
                        predicted_kl_nats=predicted,
                        measured_kl_nats=result.kl_nats,
                        measured_kl_stderr_nats=result.kl_stderr_nats,
                        text=evaluation.text.dataset + split,
                        measured_from=evaluation.measured_from,
                    )
                )
    return sorted(dict.fromkeys(checks), key=lambda check: check.stored_bits)


def _predicted(plan: BitPlan, predicting: Sequence[Scores]) -> float | None:
    """Return a plan's predicted KL: by the scores that it was made from where they are here, as calibrated by now."""
    said = plan.solver.predicted_kl_nats if plan.solver else None
    own = [scores for scores in predicting if scores.digest == plan.scores_digest]
    for scores in own or ([] if said is not None else predicting):
        try:
            found = predicted_kl(plan, scores)
        except KvprofError:
            continue
        if found is not None:
            return found
    return said
