"""Section: where the bits go.

Reads the plan.
"""

from __future__ import annotations

from kvprof.records.formats import TENSORS
from kvprof.records.plan import BitPlan
from kvprof.records.words import layers_text
from kvprof.report.page import Block, Figure, Paragraph, Section, Table, missing
from kvprof.report.plans import plan_lines
from kvprof.report.plots.plan import plan_figure
from kvprof.report.sections.losses import other_scores
from kvprof.report.series import skipped_layers, stored_tensors
from kvprof.workspace.report_inputs import ReportFiles

HEADING = "Where do the bits go?"


def plan_section(files: ReportFiles, command: str) -> Section:
    """Return the section. command: `kvprof allocate --budget 2.5`."""
    if files.plan is None:
        return Section("plan", HEADING, [missing(command, "a bit plan from the scores")])
    plan = files.plan.document
    blocks: list[Block] = [
        Paragraph(
            "A bit plan gives each layer's keys and each layer's values a format of their own. The full bar is the "
            "width of the codes, the light one on top the scales that groups of codes share; together they are what "
            "memory sees. Tall bars are tensors that the predictions cannot do without.",
            "see",
        ),
        Paragraph(_means(plan), "means"),
        Figure(
            "Bits an element of each layer's cache: keys above, values below.",
            [lambda canvas: plan_figure(plan, "the plan", canvas)],
            [_table(plan)],
        ),
        Table("What it costs, and what it is predicted to lose", ("", ""), _facts(plan), left=(0, 1)),
    ]
    blocks += other_scores("The plan", plan.scores_digest, files)
    return Section("plan", HEADING, blocks)


def _means(plan: BitPlan) -> str:
    means = {tensor: [entry.tensor(tensor).bits for entry in plan.layers] for tensor in TENSORS}
    key, value = (sum(bits) / len(bits) for bits in means.values())
    text = f"Keys get {key:.3g} bits on average, values {value:.3g}. "
    for tensor in TENSORS:
        most = max(means[tensor])
        layers = [entry.layer for entry in plan.layers if entry.tensor(tensor).bits == most]
        every = " (all of them)" if len(layers) == len(plan.layers) and len(layers) > 1 else ""
        text += f"The widest {tensor}s have {most} bits: {layers_text(layers)}{every}. "
    if plan.skipped:
        text += f"Left in full precision: {layers_text([entry.layer for entry in plan.skipped])}."
    return text.strip()


def _facts(plan: BitPlan) -> list[tuple[str, str]]:
    rows = []
    for line in plan_lines(plan):
        before, colon, after = line.partition(": ")
        rows.append((before, after) if colon else ("", line))
    return rows


def _table(plan: BitPlan) -> Table:
    entries = {entry.layer: entry for entry in plan.layers}
    stored = {tensor: {one.layer: one for one in stored_tensors(plan, tensor)} for tensor in TENSORS}
    reasons = skipped_layers(plan)
    rows = []
    for layer in range(plan.model.num_layers):
        if layer in reasons:
            rows.append([str(layer), "full", "16", "16", "full", "16", "16", reasons[layer]])
            continue
        cells = [str(layer)]
        for tensor in TENSORS:
            one = stored[tensor][layer]
            cells += [one.format, str(one.nominal_bits), f"{one.stored_bits:.4g}"]
        shares = [entries[layer].tensor(tensor).recent_fraction for tensor in TENSORS]
        rows.append([*cells, f"{max(shares):.0%} of the past in full precision" if any(shares) else ""])
    headings = ["layer", *(f"{tensor} {what}" for tensor in TENSORS for what in ("format", "bits", "stored bits")), ""]
    return Table("The plan, layer by layer", headings, rows, left=(1, 4, 7), is_long=True)
