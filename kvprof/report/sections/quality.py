"""Section: what was measured of the plan and its baselines, and how it changes along a sequence.

Reads an Evaluation.
"""

from __future__ import annotations

from kvprof.records.evaluation import Evaluation, PlanResult
from kvprof.records.words import counted
from kvprof.report.evaluations import KL_FLOOR, evaluation_lines, evaluation_verdict, nats_text
from kvprof.report.page import Block, Code, Figure, Paragraph, Section, Table, missing, sentence
from kvprof.report.plots.positions import positions_figure
from kvprof.report.series import ranked_results
from kvprof.workspace.report_inputs import ReportFiles

HEADING = "How good is it, measured?"


def quality_section(files: ReportFiles, command: str) -> Section:
    """Return the section. command: `kvprof evaluate PLAN`."""
    if files.evaluation is None:
        return Section(
            "quality", HEADING, [missing(command, "the plan's cache against full precision and its baselines")]
        )
    evaluation = files.evaluation.document
    blocks: list[Block] = [
        Paragraph(
            "The model read text twice, once with its cache in full precision and once with the cache stored as the "
            "plan says, as decoding would read it. KL divergence says how far the predictions of the next token moved, "
            "in nats a token (0 is no change); top-1 agreement is the share of tokens after which both find the same "
            "next token the likeliest; perplexity is how well the text itself was predicted (lower is better).",
            "see",
        ),
        Paragraph(_means(evaluation), "means"),
    ]
    if files.plan is not None and evaluation.plan.digest != files.plan.document.digest:
        text = f"This evaluation is of another plan than the one shown above: of {evaluation.plan.name}; "
        blocks.append(Paragraph((text, Code(command), " measures the one above."), "note"))
    blocks += [
        _results(evaluation),
        Figure(
            "The same by position: the further back the cache reaches, the more of it is quantized.",
            [lambda canvas: positions_figure(evaluation, canvas, ("kl_nats", "top1_agreement"))],
            [_positions(evaluation)],
        ),
    ]
    blocks += [Paragraph(sentence(line), "note") for line in evaluation_lines(evaluation)]
    return Section("quality", HEADING, blocks)


def _means(evaluation: Evaluation) -> str:
    plan, text = evaluation.plan, evaluation.text
    tokens = sum(part.tokens for part in plan.by_position)
    first, last = plan.by_position[0], plan.by_position[-1]
    words = (
        f"{plan.name} loses {nats_text(plan.kl_nats)} nats a token over {tokens} tokens of {text.dataset}, and agrees "
        f"on {plan.top1_agreement:.1%} of the likeliest next tokens. "
    )
    if first is not last:
        words += (
            f"At positions {first.first} to {first.last} it loses {nats_text(first.kl_nats)}, at positions "
            f"{last.first} to {last.last} {nats_text(last.kl_nats)}. "
        )
    verdict = evaluation_verdict(evaluation) if len(evaluation.plans) > 1 else ""
    return (words + (verdict + "." if verdict else "")).strip()


def _results(evaluation: Evaluation) -> Table:
    plan = evaluation.plan
    ranked = ranked_results(evaluation)
    full = ("full precision", "", "16", "0", "-", "0", "1", f"{evaluation.reference_perplexity:.2f}", "-")
    rows = [full, *(_cells(result, plan) for result in ranked)]
    split = f", {evaluation.text.split}" if evaluation.text.split else ""
    caption = (
        f"{counted(evaluation.text.sequences, 'sequence')} of {evaluation.text.dataset}{split}, from position "
        f"{evaluation.measured_from}, in {evaluation.dtype}"
    )
    headings = (
        "plan", "what it is", "stored bits", "KL, nats/token", "± stderr", "KL, 99th percentile",
        "top-1 agreement", "perplexity", "KL / the plan's",
    )  # fmt: skip
    return Table(caption, headings, rows, left=(0, 1), strong=1 + ranked.index(plan))


def _cells(result: PlanResult, plan: PlanResult) -> tuple[str, ...]:
    return (
        result.name,
        {"plan": "the plan", "rival": "baseline", "against": "compared with"}[result.role],
        f"{result.stored_bits:.4g}",
        nats_text(result.kl_nats),
        f"{result.kl_stderr_nats:#.2g}" if result.kl_stderr_nats and result.kl_nats >= KL_FLOOR else "-",
        nats_text(result.kl_p99_nats),
        f"{result.top1_agreement:.4f}",
        f"{result.perplexity:.2f}",
        f"{result.kl_nats / plan.kl_nats:.2f}" if plan.kl_nats > 0 else "-",
    )


def _positions(evaluation: Evaluation) -> Table:
    rows = [
        (
            result.name,
            f"{part.first}-{part.last}",
            str(part.tokens),
            nats_text(part.kl_nats),
            f"{part.top1_agreement:.4f}",
        )
        for result in evaluation.plans
        for part in result.by_position
    ]
    headings = ("plan", "positions", "tokens", "KL, nats/token", "top-1 agreement")
    return Table("By position", headings, rows, left=(0, 1), is_long=True)
