"""Section: what every budget buys, and where the plan and its rivals lie.

Reads a Frontier, the plan's prediction and the results of evaluations.
"""

from __future__ import annotations

from kvprof.records.evaluation import PlanResult
from kvprof.records.frontier import Frontier
from kvprof.report.charts.budgets import Measured, Predicted, draw_budgets
from kvprof.report.evaluations import KL_FLOOR, nats_text
from kvprof.report.frontiers import knee_lines
from kvprof.report.page import Block, Commands, Figure, Paragraph, Section, Table, both_widths, missing
from kvprof.report.sections.losses import other_scores
from kvprof.workspace.report_inputs import ReportFiles

HEADING = "What would another budget buy?"
WIDE, NARROW = (920, 470), (358, 460)


def budgets_section(files: ReportFiles, frontier_command: str, evaluate_command: str) -> Section:
    """Return the section. The commands are those of this model, for what is missing."""
    frontier = None if files.frontier is None else files.frontier.document
    if frontier is None and files.evaluation is None:
        absent = missing(frontier_command, "the best plan of every budget")
        return Section("budgets", HEADING, [absent, missing(evaluate_command, "the plan against its rivals")])
    measured = measured_plans(files)
    blocks: list[Block] = [
        Paragraph(
            "Fewer bits lose more. The line is the best plan at each number of stored bits, as the scores predict it; "
            "a knee is where a further bit begins to buy less than the bits before it did. Numbered marks were "
            "measured: the plan, and rivals at the bits that they store. Lower is better, and further left is smaller.",
            "see",
        )
    ]
    if frontier is None:
        blocks.append(missing(frontier_command, "the best plan of every budget"))
    else:
        blocks.append(Paragraph(_means(frontier), "means"))
    if not measured:
        blocks.append(missing(evaluate_command, "the plan against its rivals"))
    tables = []
    if frontier is not None:
        tables.append(_frontier_table(frontier))
    if measured:
        tables.append(_measured_table(measured))
    plan = _predicted(files)
    anything = any(point.predicted_kl_nats > 0 for point in frontier.points) if frontier else False
    if anything or any(each.result.kl_nats > 0 for each in measured):
        drawings = both_widths(
            draw_budgets(frontier, plan, measured, *WIDE), draw_budgets(frontier, plan, measured, *NARROW)
        )
        caption = "KL divergence from full precision against stored bits."
        if files.evaluation is not None:
            text = files.evaluation.document.text
            caption += f" Measured on {text.dataset}" + (f" ({text.split})." if text.split else ".")
        blocks.append(Figure(caption, drawings, tables))
    else:
        blocks += tables
    if frontier is not None:
        blocks += _notes(files, frontier)
    return Section("budgets", HEADING, blocks)


def measured_plans(files: ReportFiles) -> list[Measured]:
    """Return what was measured, each plan once, numbered in the order of its KL divergence."""
    if files.evaluation is None:
        return []
    own = files.evaluation.document.plans
    seen = {result.digest for result in own}
    others: list[PlanResult] = []
    for found in files.more_evaluations:
        # The other files' evaluated plan is one to compare with here.
        others += [
            result.model_copy(update={"role": "against"}) if result.role == "plan" else result
            for result in found.document.plans
            if result.digest not in seen
        ]
        seen |= {result.digest for result in others}
    ranked = sorted([*own, *others], key=lambda result: result.kl_nats)
    return [Measured(number, result, result in own) for number, result in enumerate(ranked, start=1)]


def _predicted(files: ReportFiles) -> Predicted | None:
    plan = None if files.plan is None else files.plan.document
    if plan is None or plan.solver is None or plan.budget is None:
        return None
    if plan.solver.predicted_kl_nats is None or not plan.budget.stored_bits:
        return None
    return Predicted(plan.budget.stored_bits, plan.solver.predicted_kl_nats)


def _means(frontier: Frontier) -> str:
    points = sorted(frontier.points, key=lambda point: point.stored_bits)
    first, last = points[0], points[-1]
    text = (
        f"From {first.stored_bits:.3g} to {last.stored_bits:.3g} stored bits, the predicted KL divergence of the best "
        f"plan falls from {first.predicted_kl_nats:.3g} to {last.predicted_kl_nats:.3g} nats a token."
    )
    if frontier.knees:
        knees = ", ".join(
            f"{point.stored_bits:.3g} bits ({point.predicted_kl_nats:.3g} nats, {point.compression:.3g} times smaller "
            "than 16 bits)"
            for point in frontier.knees
        )
        text += f" It bends at {knees}."
    if frontier.kl_calibration is None:
        text += " Predictions hold no factor; kvprof calibrate measures one."
    else:
        text += f" Predictions hold the factor {frontier.kl_calibration.factor:.3g} that kvprof calibrate found."
    return text


def _notes(files: ReportFiles, frontier: Frontier) -> list[Block]:
    blocks: list[Block] = []
    if frontier.knees:
        lines = [line.strip().partition(" nats: ")[2] for line in knee_lines(frontier)[1:]]
        blocks += [Paragraph("The plans at the knees are made by:", "note"), Commands(lines)]
    return blocks + other_scores("The frontier", frontier.scores, files)


def _frontier_table(frontier: Frontier) -> Table:
    rows = [
        (
            f"{point.budget:.4f}".rstrip("0").rstrip("."),
            f"{point.nominal_bits:.4g}",
            f"{point.stored_bits:.4g}",
            f"{point.compression:.3g}",
            "-" if point.bytes_per_token is None else f"{point.bytes_per_token:.6g}",
            f"{point.predicted_kl_nats:#.3g}",
            "-" if point.predicted_kl_stderr_nats is None else f"{point.predicted_kl_stderr_nats:#.2g}",
            "knee" if point.knee else "",
        )
        for point in frontier.points
    ]
    headings = (
        f"budget, {frontier.unit} bits", "nominal bits", "stored bits", "times smaller than 16 bits", "bytes/token",
        "predicted KL, nats/token", "± stderr", "",
    )  # fmt: skip
    return Table("The best plan at each budget", headings, rows, left=(7,), is_long=True)


def _measured_table(measured: list[Measured]) -> Table:
    rows = []
    for each in measured:
        result = each.result
        error = f" ± {result.kl_stderr_nats:#.2g}" if result.kl_stderr_nats and result.kl_nats >= KL_FLOOR else ""
        rows.append((str(each.number), result.name, f"{result.stored_bits:.4g}", nats_text(result.kl_nats) + error))
    strong = next((place for place, each in enumerate(measured) if each.result.role == "plan"), None)
    headings = ("no.", "plan", "stored bits", "measured KL, nats/token")
    return Table("The numbered marks", headings, rows, left=(1,), strong=strong)
