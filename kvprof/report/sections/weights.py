"""Section: how large W_k and W_v are, and whether keys are the larger everywhere.

Reads Scores with norms.
"""

from __future__ import annotations

from typing import Literal

from kvprof.records.scores import Scores
from kvprof.records.words import layers_text
from kvprof.report.page import Block, Figure, Paragraph, Section, Table, missing, sentence
from kvprof.report.plots.projections import norms_figure
from kvprof.report.sentences import larger, norm_verdict, score_remarks
from kvprof.workspace.report_inputs import ReportFiles

HEADING = "How large are the projections W_k and W_v?"
Norm = Literal["spectral_norm", "frobenius_norm"]
NORMS: dict[Norm, str] = {"spectral_norm": "spectral norm", "frobenius_norm": "Frobenius norm"}


def weights_section(files: ReportFiles, command: str) -> Section:
    """Return the section. command: of this model, `kvprof norms demo`."""
    if files.norms is None:
        return Section("weights", HEADING, [missing(command, "the norms of W_k and W_v")])
    scores = files.norms.document
    norms = [norm for norm in NORMS if norm in scores.metrics]
    blocks: list[Block] = [
        Paragraph(
            "Each layer makes its keys and values with two matrices of weights, W_k and W_v. The spectral norm is a "
            "matrix's largest singular value, the most by which it stretches any input; the Frobenius norm is the root "
            "of the sum of its squared entries. The paper Quantize What Counts (arXiv 2502.15075) observes that keys "
            "have the larger norms, and gives them more bits for that.",
            "see",
        ),
        Paragraph(_means(scores), "means"),
        Figure(
            "Norms of each layer's projections, in units of the weights.",
            [lambda canvas: norms_figure(scores, canvas)],
            [_table(scores, norms)],
        ),
    ]
    if any(entry.key.bias_norm is not None or entry.key.gain_rms is not None for entry in scores.layers):
        blocks.append(_beside(scores))
    blocks += [Paragraph(sentence(remark), "flag") for remark in score_remarks(scores, norms)]
    return Section("weights", HEADING, blocks)


def _means(scores: Scores) -> str:
    if not all(norm in scores.metrics for norm in NORMS):
        return f"These scores have one of the two norms, of {len(scores.layers)} layers."
    pairs = {entry.layer: (entry.key.spectral_norm or 0.0, entry.value.spectral_norm or 0.0) for entry in scores.layers}
    total = len(pairs)
    if (verdict := norm_verdict(scores)) is None:
        return f"Norms of the matrices that make the latent (K) and its rotary part (V), of {total} layers."
    wins = [layer for layer, pair in pairs.items() if larger(*pair) == "K"]
    text = f"By spectral norm, keys are larger in {len(wins)} of {total} layers"
    others = [layer for layer in pairs if layer not in wins]
    text += f" (all but {layers_text(others)})." if wins and 0 < len(others) <= total / 3 else "."
    known = {layer: key / value for layer, (key, value) in pairs.items() if value and key}
    if known:
        most, least = max(known, key=lambda layer: known[layer]), min(known, key=lambda layer: known[layer])
        text += (
            f" The key's norm is {known[most]:#.3g} times the value's in layer {most} and {known[least]:#.3g} times in "
            f"layer {least}."
        )
    return f"{text} In short: {verdict}."


def _table(scores: Scores, norms: list[Norm]) -> Table:
    headings = ["layer"]
    for norm in norms:
        headings += [f"{NORMS[norm]} K", f"{NORMS[norm]} V", "K / V", "larger"]
    rows = []
    for entry in scores.layers:
        cells = [str(entry.layer)]
        for norm in norms:
            key, value = getattr(entry.key, norm), getattr(entry.value, norm)
            cells += [f"{key:#.4g}", f"{value:#.4g}", f"{key / value:#.3g}" if value else "-", larger(key, value)]
        cells += [_or_dash(entry.key.stable_rank), _or_dash(entry.value.stable_rank)]
        rows.append(cells)
    text = "Norms, in units of the weights; stable rank: how many directions share the norm"
    return Table(text, [*headings, "stable rank K", "stable rank V"], rows, left=[4, 8][: len(norms)], is_long=True)


def _beside(scores: Scores) -> Table:
    rows = [
        (
            str(entry.layer),
            *map(_or_dash, (entry.key.bias_norm, entry.value.bias_norm, entry.key.gain_rms, entry.key.gain_max)),
        )
        for entry in scores.layers
    ]
    headings = ("layer", "K bias norm", "V bias norm", "k_norm gain, rms", "k_norm gain, largest")
    return Table("What the norms of the weights do not see", headings, rows, is_long=True)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:#.4g}"
