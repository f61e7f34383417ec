"""Section: do the predictions hold? Single tensors and whole plans, predicted against measured.

Reads an Audit.
"""

from __future__ import annotations

from kvprof.records.audit import Audit
from kvprof.records.words import counted
from kvprof.report.page import Block, Figure, Paragraph, Section, Table, missing, sentence
from kvprof.report.plots.audit import audit_figure, audit_labels
from kvprof.report.plots.style import Draw
from kvprof.workspace.report_inputs import ReportFiles

HEADING = "Do the predictions hold?"


def audit_section(files: ReportFiles, divergence_command: str) -> Section:
    """Return the section. divergence_command: of this model, what an audit needs first."""
    if files.audit is None:
        first = missing(divergence_command, "single tensors (slow: --layers and --formats choose a sample)")
        return Section("audit", HEADING, [first, missing("kvprof audit", "those against the predictions")])
    audit = files.audit.document
    blocks: list[Block] = [
        Paragraph(
            "Predictions are worth what measurements say of them. Each mark is one layer's keys or values, stored "
            "alone in one format: across what was predicted, upwards what was measured. On the diagonal both are "
            "equal. The rank correlation (1 at best) says whether the scores put tensors in the right order; the ratio "
            "says whether their size is right.",
            "see",
        ),
        Paragraph(_means(audit), "means"),
    ]
    for label in audit_labels(audit):
        caption = f"{label} against measured KL divergence, nats a token, a panel for each width of code."
        drawings = [_draw(audit, label, bits) for bits in sorted({point.bits for point in audit.points})]
        blocks.append(Figure(caption, drawings, [_points(audit, label)], are_small=True))
    if audit.agreements:
        blocks.append(_ranks(audit))
    if audit.ratios:
        blocks.append(_ratios(audit))
    if audit.plans:
        blocks.append(_plans(audit))
    blocks += [Paragraph(sentence(remark), "note") for remark in audit.remarks if remark]
    return Section("audit", HEADING, blocks)


def _draw(audit: Audit, label: str, bits: int) -> Draw:
    return lambda canvas: audit_figure(audit, label, canvas, bits)


def _means(audit: Audit) -> str:
    words = []
    for found in audit.agreements:
        if (
            found.label.startswith("loss_increase")
            and found.spearman is not None
            and found.group == counted(found.bits, "bit")
        ):
            words.append(
                f"the score {found.label} ranks {found.tensors} tensors at {found.group} with {found.spearman:.3f}"
            )
    for spread in audit.ratios:
        if spread.group == counted(spread.bits, "bit"):
            words.append(
                f"at {spread.group} the prediction is {spread.median:.3g} times the measurement in the median, and "
                f"between {spread.low:.3g} and {spread.high:.3g} times for 8 in 10 of the {spread.tensors}"
            )
    for plan in audit.plans:
        if plan.ratio is not None:
            words.append(
                f"for {plan.name} {plan.predicted_kl_nats:.3g} nats a token were predicted and "
                f"{plan.measured_kl_nats:.3g} measured"
            )
    text = "; ".join(words)
    return text[:1].upper() + text[1:] + "." if text else f"{len(audit.points)} tensors were measured."


def _points(audit: Audit, label: str) -> Table:
    rows = [
        (
            str(point.layer),
            point.tensor,
            point.format,
            f"{point.scores[label]:#.3g}",
            f"{point.measured_nats:#.3g}",
            "-" if point.measured_stderr_nats is None else f"{point.measured_stderr_nats:#.2g}",
        )
        for point in audit.points
        if label in point.scores
    ]
    headings = ("layer", "tensor", "format", "predicted, nats/token", "measured, nats/token", "± stderr")
    return Table(f"{label} and what was measured", headings, rows, left=(1, 2), is_long=True)


def _ranks(audit: Audit) -> Table:
    rows = [
        (each.label, each.group, str(each.tensors), "-" if each.spearman is None else f"{each.spearman:.3f}")
        for each in audit.agreements
    ]
    headings = ("metric", "of", "tensors", "rank correlation")
    return Table("Rank correlation (Spearman) with the measured divergence", headings, rows, left=(0, 1))


def _ratios(audit: Audit) -> Table:
    rows = [
        (
            each.label,
            each.group,
            str(each.tensors),
            *(f"{value:#.3g}" for value in (each.median, each.low, each.high, each.worst)),
            f"{each.worst_tensor} of layer {each.worst_layer}",
        )
        for each in audit.ratios
    ]
    headings = ("metric", "of", "tensors", "median", "10 %", "90 %", "worst", "of")
    return Table("Predicted over measured, tensor by tensor", headings, rows, left=(0, 1, 7))


def _plans(audit: Audit) -> Table:
    rows = [
        (
            plan.name,
            f"{plan.stored_bits:.4g}",
            f"{plan.predicted_kl_nats:#.3g}",
            f"{plan.measured_kl_nats:#.3g}",
            "-" if plan.measured_kl_stderr_nats is None else f"{plan.measured_kl_stderr_nats:#.2g}",
            "-" if plan.ratio is None else f"{1 / plan.ratio:.2f}",
            plan.text or "-",
            "-" if plan.measured_from is None else str(plan.measured_from),
        )
        for plan in audit.plans
    ]
    headings = (
        "plan", "stored bits", "predicted KL, nats/token", "measured KL, nats/token", "± stderr",
        "predicted / measured", "text", "from position",
    )  # fmt: skip
    return Table("Whole plans", headings, rows, left=(0, 6))
