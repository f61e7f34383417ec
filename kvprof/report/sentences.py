"""What can be said of scores and plans in a sentence: verdicts, remarks, costs.

Reads records, returns text; does not know where it is printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from kvprof.errors import UsageError
from kvprof.records.evaluation import Evaluation
from kvprof.records.formats import TENSORS, format_named
from kvprof.records.geometry import bytes_text
from kvprof.records.inventory import CONTEXTS
from kvprof.records.plan import BitPlan, Window
from kvprof.records.scores import LOSS_INCREASE, SCALAR_METRICS, Scores


def larger(key: float, value: float) -> str:
    """Return which of two norms is larger, K or V, or = where they differ by no more than rounding."""
    return "=" if math.isclose(key, value, rel_tol=1e-6) else "K" if key > value else "V"


def norm_verdict(scores: Scores) -> str:
    """Return one line on the key-value norm disparity: in how many layers K exceeds V, in each norm."""
    winners = {
        metric: [larger(*pair) for pair in zip(*(scores.column(metric, tensor) for tensor in TENSORS), strict=True)]
        for metric in ("spectral_norm", "frobenius_norm")
    }
    total = len(scores.layers)
    spectral, frobenius = (found.count("K") for found in winners.values())
    seen = {winner for found in winners.values() for winner in found}
    if seen == {"K"}:
        moral = "keys are larger everywhere, as arXiv 2502.15075 expects"
    elif seen == {"V"}:
        moral = "values are larger everywhere, against arXiv 2502.15075"
    else:
        moral = "the key-value norm disparity is not universal"
    return f"spectral K > V in {spectral} of {total} layers, Frobenius K > V in {frobenius} of {total}: {moral}"


def score_remarks(scores: Scores, metrics: Sequence[str] | None = None) -> list[str]:
    """Return a sentence for each metric that cannot tell which layers need bits, and why."""
    scalar = [metric for metric in metrics or scores.metrics if metric in SCALAR_METRICS]
    remarks = [
        f"{metric} of the {tensor}s varies by less than 1 % over all layers: it carries no information to rank them by"
        for metric in scalar
        for tensor in TENSORS
        if scores.is_flat(metric, tensor)
    ]
    if any(metric != "gradient_norm" for metric in scalar) and any(
        entry.key.gain_rms is not None for entry in scores.layers
    ):
        remarks.append("keys are normalised after k_proj: their weight norm says nothing about the cache's scale")
    return remarks


def plan_remarks(plan: BitPlan, scores: Scores) -> list[str]:
    """Return what a reader of a new plan should know of its scores, its window and its rule."""
    solver = plan.solver
    if solver is None:
        return []
    remarks = score_remarks(scores, [solver.metric]) if solver.metric else []
    if solver.metric == LOSS_INCREASE:
        remarks += loss_remarks(scores, plan.window)
        if solver.predicted_kl_nats is None:
            remarks.append("not all of these formats were scored, so no KL is predicted")
    if plan.budget is not None and plan.budget.requested is None and solver.method != "exact":
        remarks.append(f"the rule {solver.method} takes no budget: its bits are what the rule says")
    return remarks


def loss_remarks(scores: Scores, window: Window) -> list[str]:
    """Return what a reader should know of plans made by `loss_increase`, of this window."""
    remarks = []
    unknown = [name for name in scores.passed_over if not _is_format(name)]
    unfit = [name for name in scores.passed_over if _is_format(name)]
    if unknown:
        remarks.append(f"passed over, as no plan of kvprof's can store them: {', '.join(unknown)}")
    if unfit:
        why = "the scores do not say the head dimension" if scores.geometry is None else "some heads cannot have them"
        remarks.append(f"passed over where {why}: {', '.join(unfit)}")
    if scores.decoding is not None and scores.decoding.window != window:
        remarks.append(
            f"the scores were measured with {_window_text(scores.decoding.window)} in full precision, the plan keeps "
            f"{_window_text(window)}: the predicted KL is of the former"
        )
    return remarks


def kl_text(kl: float, stderr: float | None) -> str:
    """Return a predicted KL divergence with its standard error, where that is known."""
    return (f"{kl:#.3g}" if kl else "0") + (f" ± {stderr:#.2g}" if stderr else "")


def prediction_text(plan: BitPlan) -> str | None:
    """Return the KL divergence that a plan is predicted to have, in words; None where it has no prediction."""
    solver = plan.solver
    if solver is None or solver.predicted_kl_nats is None:
        return None
    kl, stderr = solver.predicted_kl_nats, solver.predicted_kl_stderr_nats
    text = f"predicted: {kl_text(kl, stderr)} nats a token of KL divergence"
    if solver.objective is None or math.isclose(kl, solver.objective, rel_tol=1e-9):
        return f"{text} (the tensors' sum, not calibrated: kvprof calibrate measures the factor)"
    return f"{text} (calibrated: {kl / solver.objective:.3g} times the tensors' sum)"


def plan_lines(plan: BitPlan) -> list[str]:
    """Return what a plan costs, in sentences: all three units of its budget, and its bytes at some contexts."""
    lines = []
    budget = plan.budget
    if budget is not None:
        if budget.requested is not None:
            in_bytes = budget.unit == "bytes"
            what = bytes_text(budget.requested) if in_bytes else f"{budget.requested:g} {budget.unit} bits an element"
            lines.append(f"asked for: {what}")
        parts = []
        if budget.nominal_bits is not None:
            parts.append(f"{budget.nominal_bits:.4g} nominal bits an element")
        if budget.stored_bits is not None:
            parts.append(f"{budget.stored_bits:.4g} stored bits ({16 / budget.stored_bits:.2f} times fewer than 16)")
        if budget.bytes_per_token is not None:
            parts.append(f"{budget.bytes_per_token:g} bytes a token")
        lines.append("costs: " + ", ".join(parts))
    for tensor in TENSORS:
        bits = [entry.tensor(tensor).bits for entry in plan.layers]
        lines.append(f"mean {tensor} bits over {len(bits)} layers: {sum(bits) / len(bits):.4f}")
    window = plan.window
    first = f"the first {window.sink_tokens} tokens and " if window.sink_tokens else ""
    lines.append(f"in full precision: {first}the last {window.recent_tokens}" + ("" if first else " tokens"))
    if plan.geometry is not None:
        for context in CONTEXTS:
            planned, full = plan.bytes_at(context), plan.geometry.bytes_at(context)
            smaller = f"{full / planned:.2f} times smaller than {plan.geometry.dtype}" if planned else ""
            lines.append(f"{context // 1024}k context: {bytes_text(planned)}, {smaller}")
    predicted = prediction_text(plan)
    if predicted is not None:
        lines.append(predicted)
    if plan.solver is not None and plan.solver.objective is not None:
        least = "the least of all plans within the budget"
        if budget is not None and budget.requested is None and plan.solver.method == "exact":
            least = "the plan is the cheapest of all that are predicted to stay below what was asked for"
        proof = least if plan.solver.optimal else "not claimed to be the least"
        lines.append(f"objective {plan.solver.objective:.6g} ({plan.solver.metric}): {proof}")
    return lines


def _is_format(name: str) -> bool:
    """Whether a name says a format that some heads can have."""
    try:
        format_named(name, "value", head_dim=64)
    except UsageError:
        return False
    return True


def _window_text(window: Window) -> str:
    return f"the first {window.sink_tokens} and the last {window.recent_tokens} tokens"


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Return what the evaluated plan stores, in sentences, and how the numbers came about."""
    plan = evaluation.plan
    lines = [
        f"costs: {plan.nominal_bits:.4g} nominal bits an element, {plan.stored_bits:.4g} stored bits, "
        f"{plan.bytes_per_token:g} bytes a token"
    ]
    for context in plan.contexts:
        size = "as large as" if context.compression == 1 else f"{context.compression:.2f} times smaller than"
        lines.append(
            f"{context.tokens} tokens: {bytes_text(context.bytes)}, window included; "
            f"{size} {bytes_text(context.bytes_at_16_bits)} at 16 bits"
        )
    if evaluation.dtype not in ("float16", "bfloat16"):
        lines.append(
            f"against 16 bits, though the model ran in {evaluation.dtype}: "
            "what is kept in full precision counts 2 bytes an element on both sides"
        )
    if evaluation.path == "exact":
        lines.append("measured token by token through the packed cache")
    return lines


def evaluation_verdict(evaluation: Evaluation) -> str:
    """Return one line on whether the plan is better than what stores no more bits, and by how much."""
    plan, comparable, unbeaten = evaluation.plan, evaluation.comparable, evaluation.unbeaten
    if not comparable:
        return f"nothing here stores as little as {plan.name}: there is nothing to compare it with"
    nearest = min(unbeaten or comparable, key=lambda result: result.kl_nats)
    if unbeaten:
        how = f"not better than {len(unbeaten)} of the {len(comparable)} others that store no more bits"
    elif len(comparable) == 1:
        how = "better than the one other that stores no more bits"
    else:
        how = f"better than all {len(comparable)} others that store no more bits"
    stderr = nearest.kl_excess_stderr_nats
    gap = f"{abs(nearest.kl_excess_nats):.3g}" + (f" ± {stderr:.2g}" if stderr is not None else "")
    if nearest.kl_nats == plan.kl_nats:
        end = f"{nearest.name} has the same KL"
    else:
        end = f"{nearest.name} has {gap} nats {'less' if unbeaten else 'more'}"
        if not unbeaten and plan.kl_nats > 0:
            end += f", {nearest.kl_nats / plan.kl_nats:.2f} times its KL"
        if stderr is not None and abs(nearest.kl_excess_nats) < 2 * stderr:
            end += "; within the noise, so measure more --sequences"
    return f"{plan.name} is {how}: {end}"


def layers_text(layers: Sequence[int]) -> str:
    """Return layer numbers with their runs shortened: layers 0-4, 6."""
    runs = []
    for _, group in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(runs)}"
