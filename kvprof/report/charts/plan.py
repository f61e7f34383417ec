"""A bit plan as bars: what each layer's keys and values store an element, codes and scales apart.

Reads a BitPlan; does not know what it costs nor what it loses.
"""

from __future__ import annotations

from kvprof.records.formats import TENSORS
from kvprof.records.plan import BitPlan
from kvprof.report.series import skipped_layers, stored_tensors
from kvprof.report.svg import Frame, Scale, layer_ticks, legend, linear_ticks, marked, picture, tag, tick_text, write

ROW = 130
"""Pixels down from the keys' axis to the values'."""
WIDEST = 60
"""Pixels of a bar, however few layers there are."""


def draw_plan(plan: BitPlan, width: float) -> str:
    """Draw keys above values, a bar a layer: codes full, scales lighter on top of them."""
    entries = {entry.layer: entry for entry in plan.layers}
    skipped = skipped_layers(plan)
    stored = {(one.layer, tensor): one.stored_bits for tensor in TENSORS for one in stored_tensors(plan, tensor)}
    highest = max(4.0, *stored.values())
    top_bits = linear_ticks(0, highest, 4)
    parts = []
    signs = [
        (tag("rect", x=-7, y=-5, width=12, height=10, class_="fill key"), "keys, codes"),
        (tag("rect", x=-7, y=-5, width=12, height=10, class_="fill value"), "values, codes"),
        (tag("rect", x=-7, y=-5, width=12, height=10, class_="fill grey half"), "scales and zero points"),
    ]
    if skipped:
        signs.append((tag("rect", x=-7, y=-5, width=12, height=10, class_="none"), "left in full precision"))
    signs_drawn, down = legend(50, 18, signs, width)
    parts.append(signs_drawn)
    for row, tensor in enumerate(TENSORS):
        frame = Frame(50, down + 34 + row * (ROW + 34), width - 6, down + 34 + row * (ROW + 34) + ROW - 26)
        x, y = frame.x(-0.5, plan.model.num_layers - 0.5), Scale(0.0, highest, frame.bottom, frame.top)
        wide = (frame.right - frame.left) / plan.model.num_layers
        for tick in top_bits:
            parts.append(tag("line", x1=frame.left, x2=frame.right, y1=y(tick), y2=y(tick), class_="grid"))
            parts.append(write(frame.left - 6, y(tick) + 4, tick_text(tick), "tick", "end"))
        parts.append(write(2, frame.top - 10, f"{tensor}s: bits an element", "title"))
        for layer in range(plan.model.num_layers):
            bar = min(wide * 0.84, WIDEST)
            left = x(layer) - bar / 2
            if layer in skipped:
                tip = f"layer {layer}: left in full precision, {skipped[layer]}"
                rect = tag("rect", x=left, y=frame.top, width=bar, height=frame.bottom - frame.top, class_="none")
                parts.append(marked(tip, rect))
                continue
            form = entries[layer].tensor(tensor)
            whole = stored[layer, tensor]
            tip = f"layer {layer} {tensor}s: {form.name}, {form.bits} bits a code, {whole:.4g} stored"
            if form.recent_fraction:
                tip += f", {form.recent_fraction:.0%} of the past in full precision"
            parts.append(
                marked(
                    tip,
                    tag("rect", x=left, y=y(whole), width=bar, height=frame.bottom - y(whole), class_="fill grey half"),
                    tag(
                        "rect",
                        x=left,
                        y=y(form.bits),
                        width=bar,
                        height=frame.bottom - y(form.bits),
                        class_=f"fill {tensor}",
                    ),
                    tag("rect", x=left, y=frame.top, width=bar, height=frame.bottom - frame.top, class_="target"),
                )
            )
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis"))
        for at, text in layer_ticks(plan.model.num_layers, frame.right - frame.left):
            parts.append(write(x(at), frame.bottom + 16, text, "tick", "middle"))
    bottom = down + 34 + 2 * ROW + 34
    parts.append(write((50 + width - 6) / 2, bottom + 8, "layer", "title", "middle"))
    label = f"Bits of each of {plan.model.num_layers} layers, keys above values"
    return picture(width, bottom + 16, label, *parts)
