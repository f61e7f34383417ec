"""The singular values of one layer's cached keys and values, with the band that its heads span.

Reads one layer's spectra; the vertical axis is that of all layers.
"""

from __future__ import annotations

from kvprof.records.formats import TENSORS
from kvprof.records.spectra import LayerSpectra, Spectrum
from kvprof.report.svg import Frame, Scale, band, line, marked, number, picture, tag, write

WIDTH, HEIGHT = 292, 216
TOLD = 32
"""Indices, at most, that say their numbers when they are pointed at."""


def draw_spectrum(entry: LayerSpectra, y_low: float, y_high: float) -> str:
    """Draw the mean over heads of each singular value, and what the heads span. y_low, y_high: of the axis."""
    frame = Frame(52, 44, WIDTH - 8, HEIGHT - 40)
    count = max(len(entry.tensor(tensor).mean) for tensor in TENSORS)
    x = frame.x(1, max(2, count))
    y = Scale(y_low, y_high, frame.bottom, frame.top, is_log=True)
    parts = [
        frame.axes(x, y, "index of the singular value", "singular value, cached units (logarithmic)", y_count=4),
        write(2, 14, f"layer {entry.layer}", "small strong"),
        write(70, 14, "keys (solid)", "small key-text"),
        write(160, 14, "values (dashed)", "small value-text"),
    ]
    for tensor in TENSORS:
        spectrum = entry.tensor(tensor)
        if spectrum.heads > 1:
            parts.append(band(_places(spectrum.high, x, y), _places(spectrum.low, x, y), f"fill {tensor} faint"))
        parts.append(line(_places(spectrum.mean, x, y), f"line {tensor}" + (" dashed" * (tensor == "value"))))
    every = -(-count // TOLD)
    wide = (frame.right - frame.left) / max(1, count - 1) * every
    for index in range(0, count, every):
        parts.append(marked(_tip(entry, index), _strip(frame, x(index + 1), wide)))
    label = f"Singular values of the cached keys and values of layer {entry.layer}"
    return picture(WIDTH, HEIGHT, label, *parts)


def _places(values: tuple[float, ...], x: Scale, y: Scale) -> list[tuple[float, float]]:
    return [(x(place), y(max(value, y.low))) for place, value in enumerate(values, start=1)]


def _tip(entry: LayerSpectra, index: int) -> str:
    spans = [
        f"{tensor}s {_span(entry.tensor(tensor), index)}"
        for tensor in TENSORS
        if index < len(entry.tensor(tensor).mean)
    ]
    return f"layer {entry.layer}, no. {index + 1}: {', '.join(spans)}"


def _strip(frame: Frame, middle: float, wide: float) -> str:
    """Return what is pointed at: from the top of the frame to its bottom, no further than its sides."""
    left, right = max(frame.left, middle - wide / 2), min(frame.right, middle + wide / 2)
    return tag("path", d=f"M{number(left)} {number(frame.top)}H{number(right)}V{number(frame.bottom)}H{number(left)}",
               class_="target")  # fmt: skip


def _span(spectrum: Spectrum, index: int) -> str:
    low, high = spectrum.low[index], spectrum.high[index]
    heads = f" ({low:.3g} to {high:.3g})" if spectrum.heads > 1 else ""
    return f"{spectrum.mean[index]:.3g}{heads}"
