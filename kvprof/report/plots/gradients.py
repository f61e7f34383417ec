"""The norms of the loss's gradients by layer, with their standard errors over calibration sequences.

Reads Scores. Does not know how a gradient is taken.
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
