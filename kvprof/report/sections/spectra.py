"""Section: the singular values of what the cache really holds.

Reads Spectra.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvprof.records.formats import TENSORS
from kvprof.records.spectra import LayerSpectra, Spectra
from kvprof.report.page import Block, Figure, Paragraph, Section, Table, missing, sentence
from kvprof.report.plots.spectra import spectra_by_layer_figure, spectra_figure
from kvprof.report.plots.style import Draw
from kvprof.report.series import spread_over
from kvprof.report.spectra import SHARE, heads_text, larger_text
from kvprof.workspace.report_inputs import ReportFiles

HEADING = "How large are the cached keys and values themselves?"
SHOWN = 6
"""Layers whose spectra are open at once, evenly spaced; the others, where they are more than two, a click away."""
A_PICTURE = 4
"""Of those others."""


def spectra_section(files: ReportFiles, command: str) -> Section:
    """Return the section. command: of this model, `kvprof spectra demo`."""
    if files.spectra is None:
        return Section("spectra", HEADING, [missing(command, "the singular values of cached keys and values")])
    spectra = files.spectra.document
    entries = spectra.layers
    picked = list(entries) if len(entries) <= SHOWN + 2 else spread_over(entries, SHOWN)
    rest = [entry for entry in entries if entry not in picked]
    blocks: list[Block] = [
        Paragraph(
            "The weights are only half of it: what is stored are keys and values of real text. For each layer and KV "
            "head, take the matrix of all tokens' keys (or values) and its singular values, the largest first. A steep "
            "fall says that a few directions hold nearly everything; a flat line says that all directions matter. "
            "Lines are means over heads and sequences, bands what the heads span.",
            "see",
        ),
        Paragraph(_means(spectra), "means"),
        Figure(
            "Layer by layer: the largest singular value of the cached keys and values, in units of the cached elements "
            "(mean over heads, a band from the least head to the largest), and how many singular values hold 90 % of "
            "the sum of squares.",
            [lambda canvas: spectra_by_layer_figure(spectra, canvas)],
            [_table(spectra)],
        ),
        Figure(
            "All singular values of some layers, in units of the cached elements; one vertical axis for all.",
            [_draw(spectra, picked)],
            [_values(picked)],
        ),
    ]
    if rest:
        blocks.append(
            Figure(
                f"The other {len(rest)} layers.",
                [_draw(spectra, rest[start : start + A_PICTURE]) for start in range(0, len(rest), A_PICTURE)],
                [_values(rest)],
                is_long=True,
                are_small=True,
            )
        )
    return Section("spectra", HEADING, blocks)


def _draw(spectra: Spectra, entries: Sequence[LayerSpectra]) -> Draw:
    return lambda canvas: spectra_figure(spectra, [entry.layer for entry in entries], canvas)


def _means(spectra: Spectra) -> str:
    text = f"{sentence(larger_text(spectra))} "
    count = len(spectra.layers)
    for tensor in TENSORS:
        ranks = [entry.tensor(tensor).values_for(SHARE) for entry in spectra.layers]
        dims = max(len(entry.tensor(tensor).mean) for entry in spectra.layers)
        text += (
            f"Of the {tensor}s' {dims} singular values {sum(ranks) / count:.1f} hold 90 % of the sum of squares on "
            f"average over layers (between {min(ranks)} and {max(ranks)}). "
        )
    return text + sentence(heads_text(spectra))


def _table(spectra: Spectra) -> Table:
    rows = []
    for entry in spectra.layers:
        cells = [str(entry.layer)]
        for norm in ("spectral_norm", "frobenius_norm"):
            key, value = (getattr(entry.tensor(tensor), norm) for tensor in TENSORS)
            cells += [f"{key:#.4g}", f"{value:#.4g}", f"{key / value:#.3g}" if value else "-"]
        rows.append([*cells, *(str(entry.tensor(tensor).values_for(SHARE)) for tensor in TENSORS)])
    headings = [
        "layer",
        *(f"{norm} {of}" for norm in ("spectral norm", "Frobenius norm") for of in ("K", "V", "K / V")),
    ]
    text = "Norms of the cached keys and values, means over heads and sequences; 90 %: singular values that hold it"
    return Table(text, [*headings, "90 % K", "90 % V"], rows, is_long=True)


def _values(entries: list[LayerSpectra]) -> Table:
    """Return each spectrum at the powers of two, its ends among them."""
    count = max(len(entry.tensor(tensor).mean) for entry in entries for tensor in TENSORS)
    places = sorted({0, count - 1, *(2**power - 1 for power in range(int(math.log2(count)) + 1))})
    rows = []
    for entry in entries:
        for tensor in TENSORS:
            values = entry.tensor(tensor).mean
            cells = [f"{values[place]:#.4g}" if place < len(values) else "-" for place in places]
            rows.append([str(entry.layer), tensor, *cells])
    headings = ["layer", "tensor", *(f"no. {place + 1}" for place in places)]
    return Table("Mean singular values, some of them", headings, rows, left=[1], is_long=True)
