"""A Frontier as a table, and the commands that make the plans at its knees.

Reads a Frontier, prints it through `console`; knows nothing of how it was made.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvprof.records.frontier import Frontier, FrontierPoint
from kvprof.records.geometry import bytes_text
from kvprof.records.words import counted
from kvprof.report.console import Table, print_plain
from kvprof.report.plans import kl_text

ROWS = 24
"""Rows of the table, knees aside: more are for the picture, and the file."""
ROUND = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Between the budgets that get a row, the finest that makes few enough."""

_OWN = {"--from": 1, "--to": 1, "--points": 1, "--context": 1, "--batch": 1, "--out": 1, "--no-plot": 0}
"""The options of `frontier` that `allocate` does not have, or that mean another thing there; and their arguments."""


def show_frontier(frontier: Frontier) -> None:
    """Print the frontier at round budgets, its ends and its knees, and how to make the plans at the knees."""
    model = frontier.model.id if frontier.model and frontier.model.id else "a model"
    plans = len({point.plan_digest for point in frontier.points})
    title = f"frontier of {model}: {counted(len(frontier.points), 'budget')}, {counted(plans, 'plan')}"
    headings = [f"budget\n{frontier.unit}", "nominal\nbits", "stored\nbits", "times\nsmaller", "bytes/\ntoken"]
    if frontier.context is not None:
        headings.append(f"at {frontier.context}\nx {frontier.batch}")
    table = Table(title, [*headings, "predicted KL\nnats/token", ""], left=[len(headings) + 1])
    for point in _rows(frontier.points):
        table.add(*_cells(point), style="bold" if point.knee else "")
    table.print()
    if frontier.kl_calibration is None:
        print_plain(
            "predicted KL is the tensors' sum, not calibrated: kvprof calibrate measures the factor", style="dim"
        )
    for line in knee_lines(frontier):
        print_plain(line)
    unproven = sum(not point.optimal for point in frontier.points)
    if unproven:
        print_plain(f"at {unproven} of the budgets the plan is the best that was found, not proven to be the least")


def knee_lines(frontier: Frontier) -> list[str]:
    """Return what can be said of the knees: where they are, and the command that makes the plan at each."""
    if not frontier.knees:
        few = len({point.plan_digest for point in frontier.points}) < 3
        return [] if few else ["no knee: every bit divides the KL divergence by about as much as the one before"]
    lines = ["knees, beyond which a further bit buys less than the bits before it did:"]
    for point in frontier.knees:
        lines.append(
            f"  {point.budget:g} {frontier.unit} bits, {point.predicted_kl_nats:#.3g} nats: "
            f"{allocate_command(frontier, point)}"
        )
    return lines


def allocate_command(frontier: Frontier, point: FrontierPoint) -> str:
    """Return the command that writes the plan of one point, with the options that the frontier was made with."""
    words = (frontier.command or "kvprof frontier").split()
    kept: list[str] = []
    skip = 0
    for word in words[2:] if words[1:2] == ["frontier"] else []:
        option, equals, _ = word.partition("=")
        if skip:
            skip -= 1
        elif option in _OWN:
            skip = 0 if equals else _OWN[option]
        else:
            kept.append(word)
    return " ".join(["kvprof allocate", f"--budget {point.budget:.15g}", *kept])


def _rows(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Return the ends, the knees, and budgets between them that are few enough to read."""
    chosen = _round_places(points) or range(0, len(points), -(-len(points) // ROWS))
    places = {0, len(points) - 1, *chosen, *(place for place, point in enumerate(points) if point.knee)}
    return [points[place] for place in sorted(places)]


def _round_places(points: Sequence[FrontierPoint]) -> list[int]:
    """Return the places of budgets that are multiples of a round number; none where budgets are not round."""
    for step in ROUND:
        places = [
            place for place, point in enumerate(points) if abs(point.budget / step - round(point.budget / step)) < 1e-9
        ]
        if len(places) <= ROWS:
            return places if len(places) >= min(len(points), ROWS // 3) else []
    return []


def _cells(point: FrontierPoint) -> list[str]:
    kl = kl_text(point.predicted_kl_nats, point.predicted_kl_stderr_nats)
    cells = [
        f"{point.budget:.4f}".rstrip("0").rstrip("."),
        f"{point.nominal_bits:.3f}",
        f"{point.stored_bits:.3f}",
        f"{point.compression:.2f}",
        "-" if point.bytes_per_token is None else f"{point.bytes_per_token:.0f}",
    ]
    if point.bytes is not None:
        cells.append(bytes_text(point.bytes))
    return [*cells, kl, "◆ knee" if point.knee else ""]
