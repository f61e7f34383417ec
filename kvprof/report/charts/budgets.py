"""The frontier and what was measured: KL divergence against stored bits, the plan and its rivals on it.

Reads a Frontier and results of an Evaluation, either of which may be absent; does not know how they were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvprof.records.evaluation import PlanResult, Role
from kvprof.records.frontier import Frontier
from kvprof.report.svg import Frame, band, fitted, legend, line, marked, marker, picture, tag, tick_text, write

SHAPES: dict[Role, str] = {"plan": "star", "rival": "square", "against": "triangle"}
"""Of a measured plan, by its role."""
CLASSES: dict[Role, str] = {"plan": "fill value", "rival": "open grey", "against": "open grey"}

MEASURED: dict[Role, str] = {
    "plan": "this plan, measured",
    "rival": "rivals, measured",
    "against": "others, measured",
}


@dataclass(frozen=True)
class Measured:
    """One measured plan, and the number by which pictures and tables name it."""

    number: int
    result: PlanResult
    is_own: bool
    """Whether it stands in the evaluation that is shown, rather than in one beside it."""


@dataclass(frozen=True)
class Predicted:
    """The plan that a report is about: what it stores, and what it is predicted to lose."""

    stored_bits: float
    kl_nats: float


def draw_budgets(
    frontier: Frontier | None, plan: Predicted | None, measured: Sequence[Measured], width: float, height: float
) -> str:
    """Draw the least predicted KL at each number of stored bits, and each measured plan at its own.

    What loses nothing has no place on a logarithmic axis.
    """
    points = [] if frontier is None else [point for point in frontier.points if point.predicted_kl_nats > 0]
    points = sorted(points, key=lambda point: point.stored_bits)
    shown = [each for each in measured if each.result.kl_nats > 0]
    losses = [point.predicted_kl_nats for point in points] + [each.result.kl_nats for each in shown]
    bits = [point.stored_bits for point in points] + [each.result.stored_bits for each in shown]
    if plan is not None and plan.kl_nats > 0:
        losses.append(plan.kl_nats)
        bits.append(plan.stored_bits)
    signs = _signs(frontier is not None, bool(points) and any(point.knee for point in points), plan, shown)
    drawn, down = legend(58, 18, signs, width - 6)
    frame = Frame(58, down + 36, width - 10, height - 42)
    low, high = min(bits), max(bits)
    room = max(0.25, (high - low) * 0.05)
    x = frame.x(max(0.0, low - room), high + room)
    y = fitted([*losses, 1.5 * max(losses)], frame.bottom, frame.top, is_log=True)  # room for numbers
    title = "KL divergence, nats a token (logarithmic)"
    ticks = [(value, tick_text(value)) for value in x.ticks(round((frame.right - frame.left) / 60))]
    parts = [drawn, frame.axes(x, y, "stored bits an element (codes and scales)", title, ticks, y_count=7)]
    places = [(x(point.stored_bits), y(point.predicted_kl_nats)) for point in points]
    spread = [(point, point.predicted_kl_stderr_nats or 0.0) for point in points]
    if any(error for _, error in spread):
        upper = [(x(point.stored_bits), y(point.predicted_kl_nats + error)) for point, error in spread]
        lower = [(x(point.stored_bits), y(max(point.predicted_kl_nats - error, y.low))) for point, error in spread]
        parts.append(band(upper, lower, "fill key faint"))
    if len(places) > 1:
        parts.append(line(places, "line key"))
    for point, place in zip(points, places, strict=True):
        tip = f"best plan at {point.stored_bits:.4g} stored bits: {point.predicted_kl_nats:.3g} nats a token predicted"
        sign = marker(*place, "diamond", "fill key", 5) if point.knee else marker(*place, "circle", "fill key", 1.6)
        parts.append(marked(tip + (", a knee" if point.knee else ""), sign, marker(*place, "circle", "target", 6)))
    if plan is not None and plan.kl_nats > 0:
        tip = f"the plan: {plan.stored_bits:.4g} stored bits, {plan.kl_nats:.3g} nats a token predicted"
        parts.append(marked(tip, marker(x(plan.stored_bits), y(plan.kl_nats), "star", "open key", 7)))
    taken: list[tuple[float, float]] = []
    for each in sorted(shown, key=lambda each: each.result.role == "plan"):  # the plan on top
        result = each.result
        at = (x(result.stored_bits), y(result.kl_nats))
        error = result.kl_stderr_nats or 0.0
        tip = f"{each.number}: {result.name}, {result.stored_bits:.4g} stored bits, {result.kl_nats:.3g}"
        tip += f" ± {error:.2g} nats a token measured" if error else " nats a token measured"
        bar = tag(
            "line", x1=at[0], x2=at[0], y1=y(result.kl_nats + error), y2=y(max(result.kl_nats - error, y.low)),
            class_="line grey",
        )  # fmt: skip
        label = _beside(at, taken, frame)
        sign = marker(*at, SHAPES[result.role], CLASSES[result.role], 7 if result.role == "plan" else 4)
        parts.append(marked(tip, bar if error else "", sign, write(*label, str(each.number), "small strong", "middle")))
    what = "Frontier of plans" if frontier is not None else "Measured plans"
    return picture(width, height, f"{what}: KL divergence against stored bits", *parts)


def _signs(
    has_frontier: bool, has_knee: bool, plan: Predicted | None, measured: Sequence[Measured]
) -> list[tuple[str, str]]:
    signs = []
    if has_frontier:
        signs.append((tag("line", x1=-9, x2=9, y1=0, y2=0, class_="line key"), "best plan, predicted"))
    if has_knee:
        signs.append((marker(0, 0, "diamond", "fill key", 5), "knee"))
    if plan is not None:
        signs.append((marker(0, 0, "star", "open key", 6), "this plan, predicted"))
    for role, text in MEASURED.items():
        if any(each.result.role == role for each in measured):
            signs.append((marker(0, 0, SHAPES[role], CLASSES[role], 6 if role == "plan" else 4), text))
    return signs


def _beside(at: tuple[float, float], taken: list[tuple[float, float]], frame: Frame) -> tuple[float, float]:
    """Return a free place for a number beside a mark, and take it."""
    places = [
        (at[0] + ring * math.cos(angle * math.pi / 6), at[1] + 4 - ring * math.sin(angle * math.pi / 6))
        for ring in range(13, 80, 8)
        for angle in (0, 6, 3, 9, 1, 5, 11, 7, 2, 4, 10, 8)
    ]
    inside = [
        (x, y)
        for x, y in places
        if frame.left < x - 7 and x + 7 < frame.right and frame.top < y - 10 and y < frame.bottom
    ] or places
    free = [place for place in inside if all(abs(place[0] - x) > 15 or abs(place[1] - y) > 13 for x, y in taken)]
    place = (free or inside)[0]
    taken += [place, (at[0], at[1] + 4)]
    return place
