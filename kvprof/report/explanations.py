"""Why a plan's tensors have the formats that they have, in tables and sentences.

Reads an Explanation, prints it through `console`; knows nothing of how it was made.
"""

from __future__ import annotations

from kvprof.records.explanation import Explanation, Move, Offer, TensorExplanation
from kvprof.report.console import Table, print_note, print_plain

LEGEND = (
    "\na bit: what a stored bit more saves, or less costs, between that format and the chosen one (▶)\n"
    "balanced: what the move changes of the plan's loss if all others give or take its bits at the shadow price\n"
    "-: best at no price of a bit"
)


def show_explanation(explanation: Explanation) -> None:
    """Print the plan's price of a bit, then for each tensor its offers, its moves and why it has what it has."""
    for line in price_lines(explanation):
        print_plain(line)
    for tensor in explanation.tensors:
        print_plain("")
        _show_offers(tensor, explanation)
        if tensor.up is not None or tensor.down is not None:
            _show_moves(tensor, explanation)
        print_plain(conclusion(tensor, explanation), style="bold")
    print_plain(LEGEND, style="dim")
    for remark in explanation.remarks:
        print_note(remark)


def price_lines(explanation: Explanation) -> list[str]:
    """Return what the plan is, and what a stored bit is worth in it, in sentences."""
    unit = " nats" if _in_nats(explanation) else ""
    loss = "unknown" if explanation.loss is None else f"{explanation.loss:.4g}{unit}"
    what = "its tensors lose, each alone, in sum" if _in_nats(explanation) else "loss"
    factor = "" if explanation.factor == 1 else f", the calibrated factor {explanation.factor:.3g} in it"
    lines = [
        f"{explanation.plan}: {explanation.stored_bits:.4f} stored bits an element; "
        f"{what} {loss} by {explanation.metric}{factor}"
    ]
    if explanation.shadow_price is None:
        lines.append("no shadow price: the plan stores fewer bits than any plan of the formats that compete")
    else:
        lines.append(
            f"shadow price: one more stored bit an element, averaged over the cache, saves "
            f"{explanation.shadow_price:.4g}{unit} where it saves the most"
        )
    return lines


def conclusion(tensor: TensorExplanation, explanation: Explanation) -> str:
    """Return one sentence on why a tensor has its format, or that it should not."""
    who = f"the {tensor.tensor} of layer {tensor.layer} has {tensor.chosen}"
    if tensor.loss is None:
        return f"{who}, which was not scored: there is nothing to compare it with"
    if tensor.verdict == "dominated":
        return f"{who}, but {tensor.prefers} stores no more bits and loses no more: {_why_not(explanation)}"
    parts = []
    if tensor.up is not None:
        parts.append(f"a bit more here saves {_loss(tensor.up.loss_per_bit, explanation)}")
    if tensor.down is not None:
        parts.append(f"a bit less here costs {_loss(tensor.down.loss_per_bit, explanation)}")
    if tensor.price is not None:
        parts.append(f"the same memory elsewhere is worth {_loss(tensor.price, explanation)}")
    facts = ", ".join(parts)
    if tensor.verdict == "unknown":
        return f"{who}: {facts}" if facts else who
    if tensor.verdict == "stays":
        end = "so it stays"
        if tensor.up is None and tensor.down is None:
            end = "nothing else competes, " + end
        elif tensor.up is None:
            end = "no other format loses less, " + end
        elif tensor.down is None:
            end = "no other format stores less, " + end
        return f"{who}: {facts}; {end}" if facts else f"{who}: {end}"
    gain = "" if tensor.gain is None else f", {_loss(tensor.gain, explanation)} better for the plan"
    return f"{who}: {facts}; at that price it would rather have {tensor.prefers}{gain}: {_why_not(explanation)}"


def _why_not(explanation: Explanation) -> str:
    """Return why a plan may not have the better format."""
    if explanation.optimal:
        return "whole formats have to fit the budget, or the plan was pinned, tied or made from fewer formats"
    if explanation.method is None or explanation.method == "exact":
        return "the plan does not claim to be the best by these scores"
    return f"the rule {explanation.method} does not look at this price"


def _show_offers(tensor: TensorExplanation, explanation: Explanation) -> None:
    unit = _unit(explanation)
    share = f"{tensor.width_share:.2%} of the cache's elements"
    title = f"the {tensor.tensor} of layer {tensor.layer} ({share}), format by format"
    headings = ("", "format", "stored\nbits", f"loss ± stderr\n{unit}", f"a bit\n{unit}", f"balanced\n{unit}")
    table = Table(title, headings, left=[0, 1])
    for offer in tensor.offers:
        table.add(*_offer_cells(offer, explanation), style="bold" if offer.chosen else "")
    table.print()


def _offer_cells(offer: Offer, explanation: Explanation) -> list[str]:
    stderr = "" if offer.stderr is None else f" ± {_scaled(offer.stderr, explanation):.2g}"
    return [
        "▶" if offer.chosen else "" if offer.on_hull else "-",
        offer.format,
        f"{offer.stored_bits:.4g}",
        f"{_scaled(offer.loss, explanation):.4g}{stderr}",
        "" if offer.loss_per_bit is None else f"{_scaled(offer.loss_per_bit, explanation):.3g}",
        "" if offer.balanced_change is None else f"{_scaled(offer.balanced_change, explanation):+.3g}",
    ]


def _show_moves(tensor: TensorExplanation, explanation: Explanation) -> None:
    unit = _unit(explanation)
    headings = ("", "plan's\nstored bits", f"plan's loss\n{unit}", f"change ± stderr\n{unit}", f"balanced\n{unit}")
    table = Table("one step along its convex hull, all else as it is", headings, left=[0])
    now = "-" if explanation.loss is None else f"{_scaled(explanation.loss, explanation):.4g}"
    table.add(f"stay at {tensor.chosen}", f"{explanation.stored_bits:.4f}", now, "", "", style="bold")
    for way, move in (("up", tensor.up), ("down", tensor.down)):
        if move is not None:
            table.add(f"{way} to {move.format}", *_move_cells(move, explanation))
    table.print()


def _move_cells(move: Move, explanation: Explanation) -> list[str]:
    stderr = "" if move.loss_change_stderr is None else f" ± {_scaled(move.loss_change_stderr, explanation):.2g}"
    return [
        f"{move.plan_stored_bits:.4f}",
        "-" if move.plan_loss is None else f"{_scaled(move.plan_loss, explanation):.4g}",
        f"{_scaled(move.loss_change, explanation):+.3g}{stderr}",
        "-" if move.balanced_change is None else f"{_scaled(move.balanced_change, explanation):+.3g}",
    ]


def _in_nats(explanation: Explanation) -> bool:
    return explanation.unit == "nats"


def _scaled(loss: float, explanation: Explanation) -> float:
    """Return a loss in what the tables count in: a tensor's share of a KL is thousandths of a nat."""
    return 1e3 * loss if _in_nats(explanation) else loss


def _unit(explanation: Explanation) -> str:
    return "1e-3 nats" if _in_nats(explanation) else ""


def _loss(loss: float, explanation: Explanation) -> str:
    if not _in_nats(explanation):
        return f"{loss:.3g}"
    return f"{1e3 * loss:.3g}e-3 nats" if abs(loss) >= 1e-5 or loss == 0 else f"{loss:.3g} nats"
