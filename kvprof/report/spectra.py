"""Spectra as a table: norms of each layer's cached keys and values, how many directions they fill, and their shapes.

Reads records, prints them through `console`; knows nothing of how they were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvprof.records.formats import TENSORS
from kvprof.records.spectra import Spectra, Spectrum
from kvprof.records.words import layers_text
from kvprof.report.console import Table, print_plain
from kvprof.report.sentences import larger

SHARE = 0.9
"""Of the energy, the sum of squares, that the effective rank counts the largest singular values of."""

MARKS = "▁▂▃▄▅▆▇█"
POINTS = 6
"""Of a sparkline: indices of a spectrum, evenly spaced, the first and the last among them."""
DECADES = 3
"""From the foot of a sparkline to its top."""


def show_spectra(spectra: Spectra) -> None:
    """Print a row for each layer, and in how many of them keys are the larger tensor."""
    table = Table(
        _title(spectra),
        ("layer", *("spec.\nK", "V", "K/V"), *("frob.\nK", "V", "K/V"), *("90 %\nK", "V"), *("shape\nK", "V")),
        left=[9, 10],
    )
    for entry in spectra.layers:
        cells = [str(entry.layer)]
        for norm in ("spectral_norm", "frobenius_norm"):
            key, value = (getattr(entry.tensor(tensor), norm) for tensor in TENSORS)
            cells += [_number(key), _number(value), _number(key / value, 3) if value else "-"]
        both = [entry.tensor(tensor) for tensor in TENSORS]
        top = max(spectrum.mean[0] for spectrum in both)
        cells += [str(spectrum.values_for(SHARE)) for spectrum in both]
        table.add(*cells, *(sparkline(spectrum.mean, top) for spectrum in both))
    table.print()
    print_plain(
        "of the (T, D) matrix of each KV head, means over heads and sequences. spec.: largest singular value; frob.: "
        f"root of the sum of squares; {SHARE:.0%}".replace("%", " %")
        + ": effective rank, how many singular values hold that share of the sum of squares; shape: the singular "
        f"values, largest first, on a log scale that ends {DECADES} decades below the layer's largest",
        style="dim",
    )
    if any(entry.tensor(tensor).heads > 1 for entry in spectra.layers for tensor in TENSORS):
        print_plain(heads_text(spectra), style="dim")
    print_plain(larger_text(spectra), style="bold")


def _title(spectra: Spectra) -> str:
    model = spectra.model.id if spectra.model is not None and spectra.model.id else "a model"
    title = f"singular values of the KV cache of {model}"
    if spectra.calibration is not None:
        text = spectra.calibration
        title += f"\non {text.sequences} sequences, {text.tokens} tokens of {text.dataset}"
    return title


def larger_text(spectra: Spectra) -> str:
    """Return one line on which tensor is larger, and where keys are not."""
    winners = {
        name: [
            larger(*(getattr(entry.tensor(tensor), f"{name}_norm") for tensor in TENSORS)) for entry in spectra.layers
        ]
        for name in ("spectral", "frobenius")
    }
    total = len(spectra.layers)
    spectral, frobenius = (found.count("K") for found in winners.values())
    latent = spectra.geometry is not None and any(layer.is_latent for layer in spectra.geometry.layers)
    names = "latents larger than their rotary parts" if latent else "keys larger"
    text = f"{names} in {spectral} of {total} layers by spectral norm, in {frobenius} of {total} by Frobenius norm"
    others = [entry.layer for entry, winner in zip(spectra.layers, winners["spectral"], strict=True) if winner != "K"]
    return text + (f"; not by spectral norm: {layers_text(others)}" if 0 < len(others) < total else "")


def heads_text(spectra: Spectra) -> str:
    """Return one line on how far heads lie apart: where the largest singular value differs most among them."""
    parts = []
    for tensor in TENSORS:
        spread = {entry.layer: _spread(entry.tensor(tensor)) for entry in spectra.layers}
        layer = max(spread, key=lambda layer: spread[layer])
        if math.isinf(spread[layer]):
            parts.append(f"{tensor}s of layer {layer} have a head of zeros")
        else:
            parts.append(f"{tensor}s {spread[layer]:.3g} times (layer {layer})")
    return f"heads of a layer differ in their largest singular value by at most: {', '.join(parts)}"


def _spread(spectrum: Spectrum) -> float:
    if spectrum.low[0]:
        return spectrum.high[0] / spectrum.low[0]
    return math.inf if spectrum.high[0] else 1.0


def sparkline(values: Sequence[float], top: float) -> str:
    """Return a spectrum as POINTS blocks, from what is DECADES below `top` or less, up to it."""
    last = len(values) - 1
    picked = [values[round(point * last / (POINTS - 1))] for point in range(POINTS)] if last else values
    return "".join(MARKS[_height(value, top)] for value in picked)


def _height(value: float, top: float) -> int:
    if not value or not top:
        return 0
    share = 1 + math.log10(value / top) / DECADES
    return min(len(MARKS) - 1, max(0, int(share * len(MARKS))))


def _number(value: float, digits: int = 4) -> str:
    """Write a number with as many digits as go into six marks; a giant or a dwarf with two."""
    if not value:
        return "0"
    if 0.1 <= value < 9999.5:
        return f"{value:#.{digits}g}".rstrip(".") if value < 10**digits - 0.5 else f"{value:.0f}"
    if 9999.5 <= value < 999999.5:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
