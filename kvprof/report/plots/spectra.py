"""The singular values of cached keys and values, a panel a layer: their mean over heads, and the band that heads span.

Reads Spectra. Does not know how they were computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from kvprof.errors import UsageError
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.spectra import LayerSpectra, Spectra
from kvprof.records.words import layers_text, read_layers
from kvprof.report.plots.hover import hover_box
from kvprof.report.plots.layers import draw_numbers, fit_scale, layer_axis, light_grid, plain_log, tensor_handles
from kvprof.report.plots.legends import legend_below
from kvprof.report.plots.style import (
    COLOURS,
    FULL_WIDTH,
    GREY,
    PAPER,
    NothingToDraw,
    Page,
    in_paper_style,
    model_name,
    new_figure,
    set_title,
)
from kvprof.report.series import SPECTRUM_FLOOR, LayerNumber, layer_count, skipped_layers, spread_over
from kvprof.report.spectra import SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 12
"""Layers that are drawn where nobody chooses."""
PANEL_WIDTH = 1.3
"""Inches, at least."""
PANELS_A_ROW = 4
TOLD = 32
"""Indices of a panel, at most, that say their numbers when they are pointed at."""
SIDE_BY_SIDE = 5.0
"""Inches that two panels of all layers need beside each other."""
STYLES: dict[TensorName, Literal["-", "--"]] = {"key": "-", "value": "--"}


@in_paper_style
def spectra_figure(spectra: Spectra, layers: Sequence[int] | None = None, page: Page = PAPER) -> Figure:
    """Draw the spectra of chosen layers, by default of a dozen, evenly spaced, on the axis of all of them.

    layers: all of them in the record. Raises NothingToDraw where every singular value is zero, MissingMatplotlib.
    """
    shown = spread_over(spectra.layers, PANELS) if layers is None else [_entry(spectra, layer) for layer in layers]
    largest = max(max(entry.tensor(tensor).high) for entry in spectra.layers for tensor in TENSORS)
    if largest <= 0:
        raise NothingToDraw("every singular value is zero: there is no spectrum to draw.")
    width = page.width_or(FULL_WIDTH)
    columns = min(len(shown), PANELS_A_ROW, max(1, int((width - 0.5) // PANEL_WIDTH)))
    rows = -(-len(shown) // columns)
    figure = new_figure(width, 0.9 + (1.45 if columns > 1 else 2.4) * rows, page)
    which = "" if len(shown) == len(spectra.layers) else f", {len(shown)} of {len(spectra.layers)} layers"
    set_title(figure, f"{model_name(spectra.model)}: spectra of cached keys and values{which}", page)
    first: Axes | None = None
    for number, entry in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, columns, number, sharex=first, sharey=first)
        first = first or axes
        _panel(axes, entry)
        if number > len(shown) - columns:
            axes.set_xlabel("index of singular value")
        axes.tick_params(labelbottom=number > len(shown) - columns, labelleft=number % columns == 1 or columns == 1)
        if number % columns == 1 or columns == 1:
            axes.set_ylabel("singular value\n(units of the cache)")
    assert first is not None
    lowest = [value for entry in spectra.layers for tensor in TENSORS for value in entry.tensor(tensor).low]
    smallest = min(value for value in lowest if value > 0)
    first.set_yscale("log")
    first.set_ylim(max(smallest, SPECTRUM_FLOOR * largest) / 1.5, 1.5 * largest)
    plain_log(first.yaxis)
    _legend(figure)
    return figure


@in_paper_style
def spectra_by_layer_figure(spectra: Spectra, page: Page = PAPER) -> Figure:
    """Draw each layer's largest singular value, with what its heads span, and how many hold most of the squares.

    Raises MissingMatplotlib.
    """
    from matplotlib.ticker import MaxNLocator

    width = page.width_or(FULL_WIDTH)
    columns = 2 if width >= SIDE_BY_SIDE else 1
    figure = new_figure(width, 0.6 + 2.3 * 2 / columns, page)
    set_title(figure, f"{model_name(spectra.model)}: largest singular values and effective ranks by layer", page)
    norms, ranks = (figure.add_subplot(2 // columns, columns, number) for number in (1, 2))
    skipped = skipped_layers(spectra)
    norm_ends, counts = [], []
    for tensor in TENSORS:
        entries = [(entry.layer, entry.tensor(tensor)) for entry in spectra.layers]
        largest = [LayerNumber(layer, own.spectral_norm) for layer, own in entries]
        rank = [LayerNumber(layer, own.values_for(SHARE)) for layer, own in entries]
        spans = [
            f" ({own.low[0]:.4g} to {own.high[0]:.4g} over {own.heads} heads)" if own.heads > 1 else ""
            for _, own in entries
        ]
        draw_numbers(norms, tensor, largest, "largest singular value", spans)
        draw_numbers(ranks, tensor, rank, f"values that hold {SHARE:.0%} of the squares:")
        if any(own.heads > 1 for _, own in entries):
            layers = [layer for layer, _ in entries]
            low, high = [own.low[0] for _, own in entries], [own.high[0] for _, own in entries]
            norms.fill_between(layers, low, high, color=COLOURS[tensor], alpha=0.25, linewidth=0)
            norm_ends += [*low, *high]
        norm_ends += [number.value for number in largest]
        counts += [number.value for number in rank]
    for axes in (norms, ranks):
        layer_axis(axes, 0, layer_count(spectra), skipped)
        light_grid(axes)
    fit_scale(norms, norm_ends)
    ranks.set_ylim(0, 1.08 * max(1, *counts))
    ranks.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    norms.set_ylabel("largest singular value\n(units of the cache)")
    ranks.set_ylabel(f"values that hold {SHARE:.0%}\nof the squares (count)")
    legend_below(figure, *tensor_handles(bool(skipped)))
    return figure


def layers_named(text: str, spectra: Spectra) -> list[int]:
    """Return the layers that a text such as "0-3,7" names, ascending; raises UsageError for one without a spectrum."""
    known = [entry.layer for entry in spectra.layers]
    chosen: set[int] = set()
    for run in read_layers(text, "--layers"):
        missing = next((layer for layer in run if layer not in known), None)
        if missing is not None:
            raise UsageError(f"--layers {text!r}: there is no spectrum of layer {missing}; of {layers_text(known)}.")
        chosen |= set(run)
    return sorted(chosen)


def _panel(axes: Axes, entry: LayerSpectra) -> None:
    """Draw a layer's keys and values: the mean as a line, the band of all heads behind it."""
    from matplotlib.ticker import MaxNLocator

    for tensor in TENSORS:
        spectrum = entry.tensor(tensor)
        places = list(range(1, len(spectrum.mean) + 1))
        low = [value or math.nan for value in spectrum.low]  # zero has no place on a logarithmic axis
        axes.fill_between(places, low, spectrum.high, color=COLOURS[tensor], alpha=0.25, linewidth=0)
        axes.plot(
            places,
            [value or math.nan for value in spectrum.mean],
            color=COLOURS[tensor],
            linestyle=STYLES[tensor],
            marker="o" if len(places) == 1 else None,
            label=f"{tensor}s",
        )
    _say_values(axes, entry)
    axes.set_title(f"layer {entry.layer}")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    light_grid(axes, "both")


def _say_values(axes: Axes, entry: LayerSpectra) -> None:
    """Let strips from top to bottom say the numbers of an index each, of some where there are many."""
    count = max(len(entry.tensor(tensor).mean) for tensor in TENSORS)
    every = -(-count // TOLD)
    for index in range(0, count, every):
        spans = []
        for tensor in TENSORS:
            own = entry.tensor(tensor)
            if index < len(own.mean):
                heads = f" ({own.low[index]:.3g} to {own.high[index]:.3g})" if own.heads > 1 else ""
                spans.append(f"{tensor}s {own.mean[index]:.3g}{heads}")
        text = f"layer {entry.layer}, no. {index + 1}: {', '.join(spans)}"
        hover_box(axes, (index + 1 - every / 2, -math.inf), (index + 1 + every / 2, math.inf), text)


def _entry(spectra: Spectra, layer: int) -> LayerSpectra:
    return next(entry for entry in spectra.layers if entry.layer == layer)


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [Line2D([], [], color=COLOURS[tensor], linestyle=STYLES[tensor]) for tensor in TENSORS]
    handles = [*lines, Patch(facecolor=GREY, alpha=0.3, linewidth=0)]
    legend_below(figure, handles, ["keys, mean over heads", "values, mean over heads", "least to largest head"])
