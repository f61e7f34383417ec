"""An Evaluation printed: every plan's results, the best first, and a verdict, in 100 columns.

Reads an Evaluation, prints it through `console`; knows nothing of how it was made.
"""

from __future__ import annotations

from kvprof.records.evaluation import Evaluation, PlanResult
from kvprof.records.geometry import bytes_text
from kvprof.records.words import counted
from kvprof.report.console import Table, print_plain
from kvprof.report.series import ranked_results

KL_FLOOR = 1e-7
"""Nats; of two equal distributions, float32 logits that were added up in another order make about a tenth of it."""


def show_evaluation(evaluation: Evaluation) -> None:
    """Print every plan's results, those of the evaluated one by position, its costs, and a verdict."""
    _show_results(evaluation)
    _show_positions(evaluation.plan)
    for line in evaluation_lines(evaluation):
        print_plain(line)
    if len(evaluation.plans) > 1:
        print_plain(evaluation_verdict(evaluation), style="bold")


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
    if evaluation.dearer:
        named = ", ".join(f"{result.name} ({_more(result, plan)})" for result in evaluation.dearer)
        lines.append(f"listed and not compared with, as they store more than {plan.name}: {named}")
    if evaluation.path == "exact":
        lines.append("measured token by token through the packed cache")
    return lines


def _more(result: PlanResult, plan: PlanResult) -> str:
    """Return what a plan stores more of: bits an element, else bytes, which a larger window takes."""
    if f"{result.stored_bits:.3f}" != f"{plan.stored_bits:.3f}":
        return f"{result.stored_bits:.3f} bits"
    return f"{bytes_text(result.contexts[-1].bytes)} at {result.contexts[-1].tokens} tokens"


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


def _show_results(evaluation: Evaluation) -> None:
    """Print a line a plan, the best first."""
    text, plan = evaluation.text, evaluation.plan
    tokens = sum(part.tokens for part in plan.by_position)
    where = f" from position {evaluation.measured_from}" if evaluation.measured_from else ""
    sequences = counted(text.sequences, "sequence")
    split = f" ({text.split})" if text.split else ""
    title = (
        f"evaluation of {plan.name} on {evaluation.model.id or 'a model'} ({evaluation.dtype})\n"
        f"{sequences}, {tokens} tokens{where} of {text.dataset}{split}"
    )
    headings = (
        "",
        "plan",
        "stored\nbits",
        "KL ± stderr\nnats/token",
        "KL\n99th",
        "top-1\nagrees",
        "perp-\nlexity",
        "KL /\nplan's",
    )
    table = Table(title, headings, left=[0, 1])
    full = _perplexity_text(evaluation.reference_perplexity)
    table.add("", "full precision", "16", "0", "0", "1", full, "-", style="dim")
    for result in ranked_results(evaluation):
        table.add(*_result_cells(result, plan), style="bold" if result is plan else "")
    table.print()


def _show_positions(plan: PlanResult) -> None:
    table = Table(f"{plan.name} by position", ("positions", "tokens", "KL\nnats/token", "top-1\nagrees"))
    for part in plan.by_position:
        numbers = (str(part.tokens), nats_text(part.kl_nats), f"{part.top1_agreement:.3f}")
        table.add(f"{part.first}-{part.last}", *numbers)
    table.print()


def _result_cells(result: PlanResult, plan: PlanResult) -> list[str]:
    stderr = f" ± {result.kl_stderr_nats:#.2g}" if result.kl_stderr_nats and result.kl_nats >= KL_FLOOR else ""
    return [
        {"plan": "▶", "rival": "", "against": "+"}[result.role],
        result.name,
        f"{result.stored_bits:.3f}",
        f"{nats_text(result.kl_nats)}{stderr}",
        nats_text(result.kl_p99_nats),
        f"{result.top1_agreement:.3f}",
        _perplexity_text(result.perplexity),
        f"{result.kl_nats / plan.kl_nats:.2f}" if plan.kl_nats > 0 else "-",
    ]


def _perplexity_text(perplexity: float) -> str:
    """Return a perplexity; of an untrained model it may have more digits than a column."""
    return f"{perplexity:.2f}" if perplexity < 1e5 else f"{perplexity:.3g}"


def nats_text(kl: float) -> str:
    """Return a divergence in nats; what is below the rounding of float32 logits is none."""
    return f"{kl:#.3g}" if kl >= KL_FLOOR else "0"
