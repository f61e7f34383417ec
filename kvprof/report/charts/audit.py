"""Predicted against measured loss, a tensor a mark, with the diagonal and a band of a factor of two.

Reads the points of an Audit; does not know how they were made.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvprof.records.audit import AuditPoint
from kvprof.records.formats import TENSORS
from kvprof.records.words import counted
from kvprof.report.charts.layers import SHAPES
from kvprof.report.svg import Frame, Scale, band, legend, line, marked, marker, picture, tag

SIDE = 400


def draw_audit_panel(points: Sequence[AuditPoint], label: str, bits: int) -> str | None:
    """Draw one metric in nats against what was measured at one width of code; None where no point is above zero."""
    shown = [point for point in points if point.measured_nats > 0 and point.scores.get(label, 0.0) > 0]
    if not shown:
        return None
    numbers = [value for point in shown for value in (point.scores[label], point.measured_nats)]
    low, high = min(numbers) / 2.2, max(numbers) * 2.2
    frame = Frame(58, 58, SIDE - 8, SIDE - 8)
    x = frame.x(low, high, is_log=True)
    y = Scale(low, high, frame.bottom, frame.top, is_log=True)
    width = counted(bits, "bit")
    parts = [
        frame.axes(x, y, "predicted, nats a token (logarithmic)", f"{width}: measured, nats a token (logarithmic)"),
        band([(x(low), y(2 * low)), (x(high / 2), y(high)), (x(high), y(high))],
             [(x(low), y(low)), (x(2 * low), y(low)), (x(high), y(high / 2))], "fill grey faint"),
        line([(x(low), y(low)), (x(high), y(high))], "line grey"),
    ]  # fmt: skip
    signs = [
        (marker(0, 0, SHAPES[tensor], f"fill {tensor}"), f"{tensor}s")
        for tensor in TENSORS
        if any(point.tensor == tensor for point in shown)
    ]
    signs.append((tag("rect", x=-8, y=-5, width=16, height=10, class_="fill grey faint"), "within a factor of two"))
    parts.append(legend(60, 22, signs, SIDE - 8)[0])
    for point in shown:
        at = (x(point.scores[label]), y(point.measured_nats))
        tip = (
            f"layer {point.layer}, {point.tensor}s {point.format}: {point.scores[label]:.3g} predicted, "
            f"{point.measured_nats:.3g} measured, nats a token"
        )
        parts.append(marked(tip, marker(*at, SHAPES[point.tensor], f"fill {point.tensor}")))
    name = f"Predicted against measured loss of {len(shown)} tensors at {width}"
    return picture(SIDE, SIDE + 38, name, *parts)
