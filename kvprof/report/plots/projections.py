"""The key and value projections by layer: their norms, a panel each, and the norms of the loss's gradients.

Reads Scores. Does not know how a norm was found or a gradient taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvprof.records.formats import TENSORS
from kvprof.records.scores import Scores
from kvprof.records.words import counted
from kvprof.report.plots.layers import draw_numbers, fit_scale, layer_axis, light_grid, tensor_handles
from kvprof.report.plots.legends import legend_below
from kvprof.report.plots.style import (
    FULL_WIDTH,
    PAPER,
    NothingToDraw,
    Page,
    in_paper_style,
    model_name,
    new_figure,
    set_title,
)
from kvprof.report.series import by_layer, layer_count, skipped_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMS = {
    "spectral_norm": "spectral norm of the projection\n(units of its weights)",
    "frobenius_norm": "Frobenius norm of the projection\n(units of its weights)",
}
SIDE_BY_SIDE = 5.0
"""Inches that two panels need beside each other."""


@in_paper_style
def norms_figure(scores: Scores, page: Page = PAPER) -> Figure:
    """Draw each norm that the scores have, of keys and of values; raises NothingToDraw, MissingMatplotlib."""
    found = {norm: {tensor: by_layer(scores, norm, tensor) for tensor in TENSORS} for norm in NORMS}
    shown = [norm for norm, own in found.items() if any(own.values())]
    if not shown:
        raise NothingToDraw("these scores have no spectral_norm and no frobenius_norm: there are no norms to draw.")
    width = page.width_or(FULL_WIDTH)
    columns = len(shown) if width >= SIDE_BY_SIDE else 1
    rows = -(-len(shown) // columns)
    figure = new_figure(width, 0.75 + 2.1 * rows, page)
    set_title(figure, f"{model_name(scores.model)}: norms of the key and value projections", page)
    skipped = skipped_layers(scores)
    for number, norm in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, columns, number)
        layer_axis(axes, 0, layer_count(scores), skipped)
        for tensor, numbers in found[norm].items():
            draw_numbers(axes, tensor, numbers, norm.replace("_", " ").replace("frobenius", "Frobenius"))
        fit_scale(axes, (one.value for numbers in found[norm].values() for one in numbers))
        axes.set_ylabel(NORMS[norm])
        light_grid(axes)
    legend_below(figure, *tensor_handles(bool(skipped)))
    return figure


@in_paper_style
def gradients_figure(scores: Scores, page: Page = PAPER) -> Figure:
    """Draw the gradient norm of every key and value projection; raises NothingToDraw, MissingMatplotlib."""
    found = {tensor: by_layer(scores, "gradient_norm", tensor) for tensor in TENSORS}
    if not any(found.values()):
        raise NothingToDraw("these scores have no gradient_norm: there are no gradients to draw.")
    figure = new_figure(page.width_or(FULL_WIDTH), 2.9, page)
    text = scores.calibration
    over = "" if text is None else f", {counted(text.sequences, 'sequence')}"
    set_title(figure, f"{model_name(scores.model)}: gradients of the loss{over}", page)
    axes = figure.add_subplot()
    skipped = skipped_layers(scores)
    layer_axis(axes, 0, layer_count(scores), skipped)
    for tensor, numbers in found.items():
        draw_numbers(axes, tensor, numbers, "gradient norm")
    fit_scale(axes, (one.value for numbers in found.values() for one in numbers))
    known = any(one.stderr for numbers in found.values() for one in numbers)
    error = " ± stderr" if known else ""
    axes.set_ylabel(f"gradient norm{error}\n(nats per unit of weight)")
    light_grid(axes)
    legend_below(figure, *tensor_handles(bool(skipped)))
    return figure
