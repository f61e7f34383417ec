"""Quality by position: each measured plan's KL divergence, or agreement, over the stretches of a sequence.

Reads results of an Evaluation; does not know how they were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from kvprof.records.evaluation import PlanResult
from kvprof.report.charts.layers import HEIGHT, PANEL
from kvprof.report.svg import Frame, Scale, fitted, legend, marked, picture, tag, write

Quantity = Literal["kl_nats", "top1_agreement"]
TITLES: dict[Quantity, str] = {
    "kl_nats": "KL divergence, nats a token",
    "top1_agreement": "top-1 agreement, share of tokens",
}


def draw_positions(results: Sequence[PlanResult], quantity: Quantity, numbers_of: Mapping[str, int]) -> str:
    """Draw a step a stretch of positions: the evaluated plan thick, what it is compared with thin.

    numbers_of: by which number other pictures call a plan, by its name; it stands at the right where there is room.
    """
    numbers = [getattr(part, quantity) for result in results for part in result.by_position]
    above = [value for value in numbers if value > 0]
    is_log = quantity == "kl_nats" and bool(above)
    frame = Frame(58, 58, PANEL - 26, HEIGHT - 42)
    first = min(result.by_position[0].first for result in results)
    last = max(result.by_position[-1].last for result in results)
    x = frame.x(first, last + 1)
    if is_log:
        y = fitted(numbers, frame.bottom, frame.top, is_log=True)
    else:
        y = Scale(_floor(numbers), 1.0, frame.bottom, frame.top)
    title = TITLES[quantity] + (" (logarithmic)" if is_log else "")
    parts = [frame.axes(x, y, "position in the sequence, tokens", title)]
    signs = [(tag("line", x1=-9, x2=9, y1=0, y2=0, class_="line value thick"), "this plan")]
    if len(results) > 1:
        signs.append((tag("line", x1=-9, x2=9, y1=0, y2=0, class_="line grey"), "what it is compared with"))
    parts.append(legend(60, 22, signs, PANEL - 8)[0])
    taken: list[float] = []
    for result in sorted(results, key=lambda result: result.role != "plan"):
        value = getattr(result.by_position[-1], quantity)
        at = y(value)
        if (value > 0 or not is_log) and all(abs(at - other) >= 12 for other in taken):
            taken.append(at)
            parts.append(write(frame.right + 5, at + 4, str(numbers_of[result.name]), "small strong"))
    for result in sorted(results, key=lambda result: result.role == "plan"):
        class_ = "line value thick" if result.role == "plan" else "line grey"
        before: float | None = None
        for part in result.by_position:
            value = getattr(part, quantity)
            if is_log and value <= 0:
                before = None
                continue
            at, left, right = y(value), x(part.first), x(part.last + 1)
            tip = f"{result.name}, positions {part.first} to {part.last}: {value:.3g}"
            tip += " nats a token" if quantity == "kl_nats" else " of the tokens"
            steps = [tag("line", x1=left, x2=right, y1=at, y2=at, class_=class_)]
            if before is not None:
                steps.append(tag("line", x1=left, x2=left, y1=before, y2=at, class_=class_))
            target = tag("rect", x=left, y=at - 5, width=right - left, height=10, class_="target")
            parts.append(marked(tip, *steps, target))
            before = at
    return picture(PANEL, HEIGHT, f"{TITLES[quantity]} by position, of {len(results)} plans", *parts)


def _floor(numbers: Sequence[float]) -> float:
    """Return where an axis of agreement begins: a tenth below the least of them, or lower."""
    least = min(numbers)
    return max(0.0, int(least * 10 - 1e-9) / 10) if least < 1 else 0.9
