"""A number of each layer's keys and values across the layers, on a logarithmic axis where they span one.

Takes numbers with what they may be off by; does not know what they measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvprof.records.formats import TENSORS, TensorName
from kvprof.report.svg import Frame, Scale, band, fitted, layer_ticks, legend, line, marked, marker, picture, tag

PANEL = 440
"""The width of one of two pictures that stand side by side, and below each other on a phone."""
HEIGHT = 270
SHAPES: dict[TensorName, str] = {"key": "circle", "value": "triangle"}
"""Shape as well as colour says which tensor it is."""
LOG_FROM = 8.0
"""Where the largest number is so many times the least, an axis is logarithmic."""


@dataclass(frozen=True)
class LayerMark:
    """One layer's number, and what its mark says. low, high: the ends of what it may be, or of what it spans."""

    layer: int
    value: float
    low: float | None = None
    high: float | None = None
    tip: str = ""


def draw_layers(
    series: Mapping[TensorName, Sequence[LayerMark]],
    num_layers: int,
    y_title: str,
    label: str,
    ends: str = "",
    as_band: bool = False,
    width: float = PANEL,
) -> str:
    """Draw keys and values layer by layer.

    ends: what low and high are, for the legend. as_band: an area between them, rather than a bar at each layer.
    """
    numbers = [each for tensor in TENSORS for each in series[tensor]]
    all_values = [value for each in numbers for value in (each.low, each.value, each.high) if value is not None]
    above = [value for value in all_values if value > 0]
    is_log = bool(above) and max(above) / min(above) >= LOG_FROM
    frame = Frame(58, 58, width - 8, HEIGHT - 42)
    x = frame.x(-0.6, num_layers - 0.4)
    y = fitted(all_values, frame.bottom, frame.top, is_log)
    scale_note = " (logarithmic)" if is_log else ""
    parts = [frame.axes(x, y, "layer", y_title + scale_note, layer_ticks(num_layers, frame.right - frame.left))]
    signs = [(marker(0, 0, SHAPES[tensor], f"fill {tensor}"), f"{tensor}s") for tensor in TENSORS]
    if ends:
        signs.append((tag("rect", x=-8, y=-5, width=16, height=10, class_="fill grey half"), ends))
    parts.append(legend(60, 22, signs, width - 8)[0])
    for tensor in TENSORS:
        for run in _runs(series[tensor]):
            parts.append(_spans(run, x, y, tensor, as_band))
            parts.append(line([(x(each.layer), y(each.value)) for each in run], f"line {tensor} thin"))
    size = min(4.0, max(1.6, (frame.right - frame.left) / num_layers / 3))
    for tensor in TENSORS:
        for each in series[tensor]:
            sign = marker(x(each.layer), y(each.value), SHAPES[tensor], f"fill {tensor}", size)
            parts.append(marked(each.tip, sign))
    return picture(width, HEIGHT, label, *parts)


def _runs(numbers: Sequence[LayerMark]) -> list[list[LayerMark]]:
    """Return the stretches of layers that follow each other: no line leads across one that has no number."""
    if not numbers:
        return []
    runs = [[numbers[0]]]
    for before, after in pairwise(numbers):
        if after.layer == before.layer + 1:
            runs[-1].append(after)
        else:
            runs.append([after])
    return runs


def _spans(run: Sequence[LayerMark], x: Scale, y: Scale, tensor: TensorName, as_band: bool) -> str:
    known = [(each, each.low, each.high) for each in run if each.low is not None and each.high is not None]
    if as_band and len(known) > 1:
        upper = [(x(each.layer), y(high)) for each, _, high in known]
        lower = [(x(each.layer), y(low)) for each, low, _ in known]
        return band(upper, lower, f"fill {tensor} faint")
    return "".join(
        tag("line", x1=x(each.layer), x2=x(each.layer), y1=y(low), y2=y(high), class_=f"line {tensor}")
        for each, low, high in known
    )
