"""Predicted losses as a heat map: a row a layer, a column a format, colour by the logarithm of the loss.

Takes losses by layer and format; does not know how they were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvprof.report.svg import Scale, drawable, log_ticks, marked, number, picture, tag, tick_text, write

STEPS = 12
"""Colours, from the least loss to the largest: the classes h0, h1, ... of the page's style."""
LEFT, TOP, RIGHT = 46, 96, 24
WIDTH = 436
LEGEND = 54


@dataclass(frozen=True)
class Column:
    """One format. detail: what to say of it besides its name."""

    name: str
    detail: str


@dataclass(frozen=True)
class Shades:
    """Which colour a loss has. low, high: nats a token, above zero."""

    low: float
    high: float

    def class_of(self, loss: float) -> str:
        """Return the class of a loss; of none at all, the least one's."""
        if loss <= self.low:
            return "h0"
        loss = min(loss, self.high)
        share = math.log(loss / self.low) / math.log(self.high / self.low)
        return f"h{min(STEPS - 1, int(share * STEPS))}"


def shades_of(losses: Sequence[float]) -> Shades:
    """Return shades that hold all losses, from a power of ten to another."""
    above = [loss for loss in losses if loss > 0] or [1.0]
    least, most = drawable(min(above)), drawable(max(above))
    low, high = (10.0 ** math.floor(math.log10(least)), 10.0 ** math.ceil(math.log10(most)))
    return Shades(low, high if high > low else 10 * low)


def draw_heat(
    rows: Sequence[tuple[int, Mapping[str, float]]],
    columns: Sequence[Column],
    shades: Shades,
    what: str,
    chosen: Mapping[int, str],
) -> str:
    """Draw one tensor's losses. what: `keys` or `values`. chosen: each layer's format in the plan, which gets a frame.

    A layer without a number of a format has an empty cell there.
    """
    wide = min(26.0, (WIDTH - LEFT - RIGHT) / max(1, len(columns)))
    high = 16.0 if len(rows) <= 40 else 11.0
    right, bottom = LEFT + wide * len(columns), TOP + high * len(rows)
    parts = [write(2, 14, f"{what}: layer (down), format (across)", "title")]
    for place, column in enumerate(columns):
        parts.append(write(LEFT + wide * (place + 0.5) + 4, TOP - 6, column.name, "tick", turn=-60))
    every = 1 if high >= 16 else 2
    for row, (layer, losses) in enumerate(rows):
        y = TOP + high * row
        if row % every == 0:
            parts.append(write(LEFT - 6, y + high / 2 + 4, str(layer), "tick", "end"))
        for place, column in enumerate(columns):
            loss = losses.get(column.name)
            x = LEFT + wide * place
            if loss is None:
                parts.append(tag("rect", x=x, y=y, width=wide, height=high, class_="none"))
                continue
            tip = f"layer {layer}, {what} {column.name} ({column.detail}): {loss:.3g} nats a token"
            tip += ", in the plan" if chosen.get(layer) == column.name else ""
            parts.append(marked(tip, tag("rect", x=x, y=y, width=wide, height=high, class_=shades.class_of(loss))))
    for row, (layer, _) in enumerate(rows):
        for place, column in enumerate(columns):
            if chosen.get(layer) == column.name:
                at = (LEFT + wide * place + 1, TOP + high * row + 1)
                for class_ in ("chosen under", "chosen"):  # seen on the lightest colour and on the darkest
                    parts.append(tag("rect", x=at[0], y=at[1], width=wide - 2, height=high - 2, class_=class_))
    parts.append(_legend(shades, bottom + 20))
    label = f"Heat map of the predicted loss of {what}, {len(rows)} layers by {len(columns)} formats"
    return picture(max(right + RIGHT, 340), bottom + LEGEND + 12, label, *parts)


def _legend(shades: Shades, top: float) -> str:
    width = 230.0
    parts = [
        tag("rect", x=LEFT + width / STEPS * step, y=top, width=width / STEPS + 0.3, height=10, class_=f"h{step}")
        for step in range(STEPS)
    ]
    scale = Scale(shades.low, shades.high, LEFT, LEFT + width, is_log=True)
    for tick in log_ticks(shades.low, shades.high, 5):
        parts.append(tag("path", d=f"M{number(scale(tick))} {number(top + 10)}v4", class_="axis"))
        parts.append(write(scale(tick), top + 25, tick_text(tick), "tick", "middle"))
    parts.append(write(LEFT, top + 41, "nats a token of KL divergence (logarithmic)", "title"))
    return "".join(parts)
