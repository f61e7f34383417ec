"""Section: how strongly the loss pulls at W_k and W_v.

Reads Scores with gradient norms.
"""

from __future__ import annotations

from kvprof.records.formats import TENSORS
from kvprof.records.scores import Scores
from kvprof.report.page import Block, Figure, Paragraph, Section, Table, missing, sentence
from kvprof.report.plots.projections import gradients_figure
from kvprof.report.sentences import score_remarks
from kvprof.workspace.report_inputs import ReportFiles

HEADING = "How strongly does the loss pull at W_k and W_v?"


def gradients_section(files: ReportFiles, command: str) -> Section:
    """Return the section. command: of this model, `kvprof gradients demo`."""
    if files.gradients is None:
        return Section("gradients", HEADING, [missing(command, "gradient norms")])
    scores = files.gradients.document
    blocks: list[Block] = [
        Paragraph(
            "The gradient norm says how fast the model's loss would change if a layer's W_k or W_v moved. The paper "
            "KVmix (arXiv 2506.08018) gives more bits where it is large. It does not see how much error a format makes "
            "there: for that, see the predicted loss below.",
            "see",
        ),
        Paragraph(_means(scores), "means"),
        Figure(
            "L2 norm of the gradient of the loss with respect to each projection, in nats per unit of weight: mean "
            "over calibration sequences, bars one standard error.",
            [lambda canvas: gradients_figure(scores, canvas)],
            [_table(scores)],
        ),
    ]
    remarks = score_remarks(scores, ["gradient_norm"])
    blocks += [Paragraph(sentence(remark), "flag") for remark in remarks]
    return Section("gradients", HEADING, blocks)


def _means(scores: Scores) -> str:
    layers = [entry.layer for entry in scores.layers]
    keys, values = (scores.column("gradient_norm", tensor) for tensor in TENSORS)
    wins = sum(key > value for key, value in zip(keys, values, strict=True))
    text = f"The gradient of W_k is the larger one in {wins} of {len(layers)} layers. "
    for tensor, numbers in (("key", keys), ("value", values)):
        top = max(range(len(numbers)), key=lambda place: numbers[place])
        text += f"Of the {tensor}s, layer {layers[top]} has the largest, {numbers[top]:.3g}. "
    if scores.calibration is not None:
        of = scores.calibration
        text += f"Measured on {of.sequences} sequences, {of.tokens} tokens of {of.dataset}."
    return text.strip()


def _table(scores: Scores) -> Table:
    rows = []
    for entry in scores.layers:
        cells = [str(entry.layer)]
        for tensor in TENSORS:
            found = entry.tensor(tensor)
            for number in (found.gradient_norm, found.gradient_norm_stderr):
                cells.append("-" if number is None else f"{number:#.4g}")
        rows.append(cells)
    headings = ("layer", "gradient norm K", "± stderr", "gradient norm V", "± stderr")
    return Table("Gradient norms, nats per unit of weight", headings, rows, is_long=True)
