"""Section: what every budget buys, and where the plan and its baselines lie.

Reads a Frontier, the plan's prediction and the results of evaluations.
"""

from __future__ import annotations

from kvprof.records.evaluation import PlanResult
from kvprof.records.frontier import Frontier
from kvprof.report.evaluations import KL_FLOOR, nats_text
from kvprof.report.frontiers import knee_lines
from kvprof.report.page import Block, Commands, Figure, Paragraph, Section, Table, missing
from kvprof.report.plots.frontier import frontier_figure
from kvprof.report.sections.losses import other_scores
from kvprof.workspace.report_inputs import ReportFiles

HEADING = "What would another budget buy?"


def budgets_section(files: ReportFiles, frontier_command: str, evaluate_command: str) -> Section:
    """Return the section. The commands are those of this model, for what is missing."""
    frontier = None if files.frontier is None else files.frontier.document
    if frontier is None and files.evaluation is None:
        absent = missing(frontier_command, "the best plan of every budget")
        return Section("budgets", HEADING, [absent, missing(evaluate_command, "the plan against its baselines")])
    measured = _measured_plans(files)
    blocks: list[Block] = [
        Paragraph(
            "Fewer bits lose more. The line is the best plan at each number of stored bits, as the scores predict it; "
            "a knee is where a further bit begins to buy less than the bits before it did. The other marks were "
            "measured: the plan, and baselines at the bits that they store. Lower is better, and further left is "
            "smaller.",
            "see",
        )
    ]
    if frontier is None:
        blocks.append(missing(frontier_command, "the best plan of every budget"))
    else:
        blocks.append(Paragraph(_means(frontier), "means"))
    if not measured:
        blocks.append(missing(evaluate_command, "the plan against its baselines"))
    tables = []
    if frontier is not None:
        tables.append(_frontier_table(frontier))
    if measured:
        tables.append(_measured_table(measured))
    plan = None if files.plan is None else files.plan.document
    caption = "KL divergence from full precision against stored bits."
    if files.evaluation is not None:
        text = files.evaluation.document.text
        caption += f" Measured on {text.dataset}" + (f" ({text.split})." if text.split else ".")
    blocks.append(Figure(caption, [lambda canvas: frontier_figure(frontier, measured, canvas, plan)], tables))
    if frontier is not None:
        blocks += _notes(files, frontier)
    return Section("budgets", HEADING, blocks)


def _measured_plans(files: ReportFiles) -> list[PlanResult]:
    """Return what was measured, each plan once, the least KL divergence first."""
    if files.evaluation is None:
        return []
    found = list(files.evaluation.document.plans)
    for more in files.more_evaluations:
        seen = {result.digest for result in found}
        # The other files' evaluated plan is one to compare with here.
        found += [
            result.model_copy(update={"role": "against"}) if result.role == "plan" else result
            for result in more.document.plans
            if result.digest not in seen
        ]
    return sorted(found, key=lambda result: result.kl_nats)


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


def _measured_table(measured: list[PlanResult]) -> Table:
    rows = []
    for result in measured:
        error = f" ± {result.kl_stderr_nats:#.2g}" if result.kl_stderr_nats and result.kl_nats >= KL_FLOOR else ""
        rows.append((result.name, f"{result.stored_bits:.4g}", nats_text(result.kl_nats) + error))
    strong = next((place for place, result in enumerate(measured) if result.role == "plan"), None)
    return Table(
        "What was measured", ("plan", "stored bits", "measured KL, nats/token"), rows, left=(0,), strong=strong
    )
