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
from kvprof.report.plots.layers import light_grid
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
from kvprof.report.series import SPECTRUM_FLOOR, spread_over

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 12
"""Layers that are drawn where nobody chooses."""
PANEL_WIDTH = 1.3
"""Inches, at least."""
PANELS_A_ROW = 4
STYLES: dict[TensorName, Literal["-", "--"]] = {"key": "-", "value": "--"}


@in_paper_style
def spectra_figure(spectra: Spectra, layers: Sequence[int] | None = None, page: Page = PAPER) -> Figure:
    """Draw the spectra of chosen layers, by default of a dozen, evenly spaced.

    layers: all of them in the record. Raises NothingToDraw where every singular value is zero, MissingMatplotlib.
    """
    shown = spread_over(spectra.layers, PANELS) if layers is None else [_entry(spectra, layer) for layer in layers]
    largest = max(max(entry.tensor(tensor).high) for entry in shown for tensor in TENSORS)
    if largest <= 0:
        raise NothingToDraw("every singular value is zero: there is no spectrum to draw.")
    width = page.width_or(FULL_WIDTH)
    columns = min(len(shown), PANELS_A_ROW, max(1, int((width - 0.5) // PANEL_WIDTH)))
    rows = -(-len(shown) // columns)
    figure = new_figure(width, 0.9 + (1.45 if columns > 1 else 2.4) * rows, page)
    which = "" if len(shown) == len(spectra.layers) else f", {len(shown)} of {len(spectra.layers)} layers"
    set_title(figure, f"{model_name(spectra.model)}: spectra of cached keys and values{which}")
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
    smallest = min(value for entry in shown for tensor in TENSORS for value in entry.tensor(tensor).low if value > 0)
    first.set_yscale("log")
    first.set_ylim(max(smallest, SPECTRUM_FLOOR * largest) / 1.5, 1.5 * largest)
    _legend(figure)
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
    axes.set_title(f"layer {entry.layer}")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    light_grid(axes, "both")


def _entry(spectra: Spectra, layer: int) -> LayerSpectra:
    return next(entry for entry in spectra.layers if entry.layer == layer)


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [Line2D([], [], color=COLOURS[tensor], linestyle=STYLES[tensor]) for tensor in TENSORS]
    handles = [*lines, Patch(facecolor=GREY, alpha=0.3, linewidth=0)]
    legend_below(figure, handles, ["keys, mean over heads", "values, mean over heads", "least to largest head"])
