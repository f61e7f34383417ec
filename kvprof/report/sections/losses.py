"""Section: what every way to store every layer's keys and values is predicted to cost.

Reads Scores with `loss_increase`, and the plan, whose choices the picture frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores
from kvprof.records.words import short_digest
from kvprof.report.page import Block, Figure, Paragraph, Section, Table, missing
from kvprof.report.plots.losses import losses_figure
from kvprof.report.plots.style import Draw
from kvprof.report.series import ScoredFormat, scored_formats
from kvprof.workspace.report_inputs import ReportFiles

HEADING = "What does each way to store them cost?"
WIDE_SPREAD = 4.0
"""Where one tensor loses so many times what another does, it is worth another bit: one divides a loss by about four."""


def losses_section(files: ReportFiles, command: str) -> Section:
    """Return the section. command: of this model, `kvprof gradients demo`."""
    if files.losses is None:
        return Section("losses", HEADING, [missing(command, "the predicted loss of every format")])
    scores = files.losses.document
    plan = None if files.plan is None else files.plan.document
    losses = {tensor: _losses(scores, tensor) for tensor in TENSORS}
    formats = {tensor: scored_formats(scores, tensor) for tensor in TENSORS}
    framed = " A frame marks the format that the plan gives a layer." if plan is not None else ""
    blocks: list[Block] = [
        Paragraph(
            "Each cell answers one question: if this layer's keys (or values) alone were stored in this format and all "
            "else in full precision, how far would the model's predictions move? The unit is nats a token of "
            "Kullback-Leibler divergence: 0 is no change at all. Formats are named as in "
            "the plan: int3g64 has codes of 3 bits and one scale for 64 of them, a c at the end clips outliers, rot3 "
            "rotates first." + framed,
            "see",
        ),
        Paragraph(_means(scores, losses, formats), "means"),
        Figure(
            "Predicted loss of each layer's keys and values, format by format: nats a token, one colour scale for "
            "both; formats from the fewest stored bits to the most.",
            [_draw(scores, plan, tensor) for tensor in TENSORS if formats[tensor]],
            [_table(losses[tensor], formats[tensor], tensor) for tensor in TENSORS if formats[tensor]],
            are_small=True,
        ),
    ]
    if scores.decoding is not None:
        window = scores.decoding.window
        text = (
            f"With the first {window.sink_tokens} and the last {window.recent_tokens} tokens in full precision, as "
            f"the scores were measured; {scores.decoding.tokens} predicted tokens counted."
        )
        blocks.append(Paragraph(text, "note"))
    return Section("losses", HEADING, blocks)


def other_scores(what: str, digest: str | None, files: ReportFiles) -> list[Block]:
    """Return a note where `what` was made from other scores than this section shows. digest: of those; None unknown."""
    shown = None if files.losses is None else files.losses.document.digest
    if digest is None or shown in (None, digest):
        return []
    text = (
        f"{what} was made from other scores than those shown above ({short_digest(digest)}, not {short_digest(shown)})."
    )
    return [Paragraph(text, "note")]


def _losses(scores: Scores, tensor: TensorName) -> dict[int, Mapping[str, float]]:
    """Return the losses of each layer that has any; of those that a plan covers where that is known."""
    rows = {entry.layer: entry.tensor(tensor).loss_increase or {} for entry in scores.planned or scores.layers}
    return {layer: row for layer, row in rows.items() if row}


def _draw(scores: Scores, plan: BitPlan | None, tensor: TensorName) -> Draw:
    return lambda canvas: losses_figure(scores, canvas, (tensor,), plan)


def _means(
    scores: Scores,
    losses: Mapping[TensorName, Mapping[int, Mapping[str, float]]],
    formats: Mapping[TensorName, Sequence[ScoredFormat]],
) -> str:
    """Say which tensors are the dearest at 2 bits, or at the narrowest width that keys and values share."""
    names = {
        tensor: {form.name: form.nominal_bits for form in formats[tensor] if form.nominal_bits is not None}
        for tensor in TENSORS
    }
    shared = sorted(set(names["key"].values()) & set(names["value"].values()))
    if not shared:
        return f"Scored: {len(formats['key'])} formats for keys and {len(formats['value'])} for values."
    bits = 2 if 2 in shared else shared[0]
    best = {
        (layer, tensor): min(row[name] for name in row if names[tensor].get(name) == bits)
        for tensor in TENSORS
        for layer, row in losses[tensor].items()
        if any(names[tensor].get(name) == bits for name in row)
    }
    if not best:
        return f"Scored: {len(formats['key'])} formats for keys and {len(formats['value'])} for values."
    dearest, cheapest = max(best, key=lambda each: best[each]), min(best, key=lambda each: best[each])
    text = (
        f"In its best {bits}-bit format, the dearest tensor is the {dearest[1]}s of layer {dearest[0]} with "
        f"{best[dearest]:.3g} nats a token"
    )
    if best[cheapest] > 0:
        text += (
            f", {best[dearest] / best[cheapest]:.3g} times what the cheapest costs (the {cheapest[1]}s of layer "
            f"{cheapest[0]}, {best[cheapest]:.3g})"
        )
    spread = best[dearest] / best[cheapest] if best[cheapest] > 0 else math.inf
    totals = {tensor: sum(loss for (_, of), loss in best.items() if of == tensor) for tensor in TENSORS}
    text += f". All keys together would cost {totals['key']:.3g} at {bits} bits, all values {totals['value']:.3g}."
    return text + (" With such a spread, one width for all wastes bits." if spread >= WIDE_SPREAD else "")


def _table(rows: Mapping[int, Mapping[str, float]], formats: Sequence[ScoredFormat], tensor: TensorName) -> Table:
    headings = ["layer", *(form.name for form in formats)]
    cells = [
        [str(layer), *(f"{row[form.name]:#.3g}" if form.name in row else "-" for form in formats)]
        for layer, row in rows.items()
    ]
    return Table(f"Predicted loss of {tensor}s, nats a token", headings, cells, is_long=True)
