"""Why a tensor has the format that it has: its price of a bit against the price of a bit in the whole plan.

Reads a plan and the scores it was made from; writes an Explanation. Changes no plan, and does not print.

The shadow price is the dual of the budget in the linear relaxation, where tensors may mix two formats: what one more
stored bit an element saves where it saves the most. A tensor of an optimal plan saves less by another bit, and loses
more by one bit less; but for the few that whole formats left at the margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvprof.allocate.hull import corners, shadow_price
from kvprof.allocate.losses import (
    PredictedLoss,
    fitting_scores,
    kl_factor,
    stderr_of_mean,
    window_remark,
)
from kvprof.allocate.prediction import predicted_kl, unscored_remark
from kvprof.analysis.cases import Case, cases_of
from kvprof.analysis.recorded import read_request
from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.records.explanation import Explanation, Move, Offer, TensorExplanation, Verdict
from kvprof.records.formats import TENSORS
from kvprof.records.plan import BitPlan
from kvprof.records.scores import LOSS_INCREASE, METRICS, Scores
from kvprof.records.words import layers_text, read_layers

EQUAL = 1e-9
"""Relative; what two ways of adding up the same losses may differ by."""


def explain(
    plan: BitPlan,
    scores: Scores,
    layers: Sequence[str],
    *,
    tensor: str | None = None,
    metric: str | None = None,
    formats: str | None = None,
    names: tuple[str, str] = ("plan", "scores"),
) -> Explanation:
    """Return what the K and V of some layers cost at each format, and what moving them would do to the plan.

    layers: "7" or "3-5", any number of them. tensor: "key", "value", "latent" or "rope" alone. metric: by default the
    plan's own, else the first that the scores have. formats: those that compete for the budget besides the chosen ones,
    as `parse_formats` reads them; by default all that were scored. names: what the two files are called.
    Raises UsageError for a layer, tensor, metric or format that there is not, Mismatch for scores of another model,
    InvalidFile for scores that lack the metric.
    """
    scores = fitting_scores(plan, scores)
    asked = parse_layers(layers, plan)
    metric = metric or _metric_of(plan, scores)
    cases = cases_of(plan, scores, metric, formats)
    _check_tensor(tensor, cases)
    width = sum(case.tensor.width for case in cases)
    spent = sum((case.entry.stored_bits(case.tensor.head_dim) * case.tensor.width for case in cases), Fraction(0))
    price = shadow_price([case.points for case in cases], spent)
    losses = [case.chosen.loss for case in cases if case.chosen is not None]
    market = _Market(price, width, spent, math.fsum(losses) if len(losses) == len(cases) else None)
    by_nats = metric == LOSS_INCREASE
    return Explanation(
        plan=names[0],
        scores=names[1],
        metric=metric,
        unit="nats" if by_nats else f"{metric}^2 * 4^-bits",
        method=plan.solver.method if plan.solver else None,
        optimal=plan.solver is not None and plan.solver.optimal and plan.solver.metric == metric,
        stored_bits=float(spent / width),
        loss=market.loss,
        shadow_price=None if price is None else price * width,
        factor=kl_factor(scores) if by_nats else 1.0,
        tensors=tuple(
            _explain_tensor(case, market)
            for layer in asked
            for name in TENSORS
            for case in cases
            if (case.tensor.layer, case.tensor.name) == (layer, name) and tensor in (None, case.tensor.word)
        ),
        remarks=(
            *_remarks(names[0], plan, scores, cases, by_nats),
            *([] if formats else _narrowed_remarks(plan)),
        ),
    )


def parse_layers(texts: Sequence[str], plan: BitPlan) -> list[int]:
    """Return the layers that texts such as "7", "3-5" or "3,7" name, ascending, each once.

    Raises UsageError for a text that names none, or a layer that the plan gives no bits to.
    """
    planned = {entry.layer for entry in plan.layers}
    reasons = {entry.layer: entry.reason for entry in plan.skipped or ()}
    found: set[int] = set()
    for run in (run for text in texts for run in read_layers(text, "--layer")):
        missing = next((layer for layer in run if layer not in planned), None)
        if missing is not None:
            why = f"is skipped ({reasons[missing]})" if missing in reasons else "does not exist"
            raise UsageError(f"layer {missing} {why}; the plan gives bits to {layers_text(sorted(planned))}.")
        found |= set(run)
    if not found:
        raise UsageError("no layer to explain.\n  Write --layer 7, or --layer 3-5.")
    return sorted(found)


def _check_tensor(word: str | None, cases: Sequence[Case]) -> None:
    words = list(dict.fromkeys(case.tensor.word for case in cases))
    if word is not None and word not in words:
        raise UsageError(f"no tensor is called {word!r}: {did_you_mean(word, words)}")


def _metric_of(plan: BitPlan, scores: Scores) -> str:
    """Return the metric that the plan was made by, else the first that the scores have."""
    if plan.solver is not None and plan.solver.metric in METRICS:
        return plan.solver.metric
    tensors = [entry.tensor(name) for entry in scores.layers for name in TENSORS]
    have_losses = all(found.loss_increase is not None for found in tensors)
    return LOSS_INCREASE if have_losses else next(iter(scores.metrics), LOSS_INCREASE)


@dataclass(frozen=True)
class _Market:
    """What all tensors together make of the budget."""

    price: float | None
    """Loss a stored bit of one element."""
    width: int
    """Cached elements a token, of all tensors."""
    spent: Fraction
    """Stored bits of all tensors, a token."""
    loss: float | None


def _explain_tensor(case: Case, market: _Market) -> TensorExplanation:
    tensor, chosen = case.tensor, case.chosen
    price = None if market.price is None else market.price * tensor.width
    hull = [case.choices[place] for place in corners(case.points)]
    up = down = None
    if chosen is not None:
        above = [choice for choice in hull if case.bits(choice) > case.bits(chosen)]
        below = [choice for choice in hull if case.bits(choice) < case.bits(chosen)]
        up = _move(case, chosen, above[0], market, price) if above else None
        down = _move(case, chosen, below[-1], market, price) if below else None
    verdict, prefers, gain = _verdict(case, price)
    return TensorExplanation(
        layer=tensor.layer,
        tensor=tensor.word,
        chosen=case.entry.name,
        stored_bits=float(case.entry.stored_bits(tensor.head_dim)),
        loss=None if chosen is None else chosen.loss,
        width_share=tensor.width / market.width,
        price=price,
        offers=tuple(
            _offer(case, choice, choice in hull, price)
            for choice in sorted(case.choices, key=lambda choice: (case.bits(choice), -choice.loss))
        ),
        up=up,
        down=down,
        verdict=verdict,
        prefers=None if prefers is None else prefers.format.name,
        gain=gain,
    )


def _offer(case: Case, choice: PredictedLoss, on_hull: bool, price: float | None) -> Offer:
    chosen = case.chosen
    added = None if chosen is None or choice is chosen else float(case.bits(choice) - case.bits(chosen))
    return Offer(
        format=choice.format.name,
        stored_bits=float(case.bits(choice)),
        loss=choice.loss,
        stderr=choice.stderr,
        chosen=choice is chosen,
        on_hull=on_hull,
        loss_per_bit=(chosen.loss - choice.loss) / added if chosen is not None and added else None,
        balanced_change=None
        if chosen is None or added is None or price is None
        else choice.loss - chosen.loss + price * added,
    )


def _move(case: Case, chosen: PredictedLoss, to: PredictedLoss, market: _Market, price: float | None) -> Move:
    added, change = case.bits(to) - case.bits(chosen), to.loss - chosen.loss
    stderr = None
    if chosen.samples is not None and to.samples is not None and len(chosen.samples) == len(to.samples):
        stderr = stderr_of_mean([after - before for before, after in zip(chosen.samples, to.samples, strict=True)])
    return Move(
        format=to.format.name,
        plan_stored_bits=float((market.spent + added * case.tensor.width) / market.width),
        plan_loss=None if market.loss is None else market.loss + change,
        loss_change=change,
        loss_change_stderr=stderr,
        loss_per_bit=-change / float(added),
        balanced_change=None if price is None else change + price * float(added),
    )


def _verdict(case: Case, price: float | None) -> tuple[Verdict, PredictedLoss | None, float | None]:
    """Return the verdict, with the better format and what having it would take off the plan's loss."""
    chosen = case.chosen
    if chosen is None:
        return "unknown", None, None

    def total(choice: PredictedLoss) -> float:
        return choice.loss + (price or 0.0) * float(case.bits(choice))

    better = [
        choice
        for choice in case.choices
        if case.bits(choice) <= case.bits(chosen)
        and choice.loss <= chosen.loss
        and (case.bits(choice), choice.loss) != (case.bits(chosen), chosen.loss)
    ]
    if better:
        best = min(better, key=total)
        return "dominated", best, total(chosen) - total(best)
    if price is None:
        return "unknown", None, None
    best = min(case.choices, key=total)
    if total(best) >= total(chosen) * (1 - EQUAL):
        return "stays", None, None
    return "would move", best, total(chosen) - total(best)


def _narrowed_remarks(plan: BitPlan) -> list[str]:
    """Return whether the plan says that it was made from less than all that was scored."""
    try:
        options = read_request(plan).narrowing
    except InvalidFile:
        return []
    if not options:
        return []
    return [f"the plan was made with {', '.join(options)}; prices here are of a free choice (--formats narrows it)"]


def _remarks(name: str, plan: BitPlan, scores: Scores, cases: Sequence[Case], by_nats: bool) -> list[str]:
    """Return what a reader should know before trusting the explanation."""
    remarks = []
    if plan.scores_digest not in (None, scores.digest):
        remarks.append("these are not the scores that the plan was made from: its choices followed other numbers")
    unscored = [(case.tensor, case.entry) for case in cases if case.chosen is None]
    if unscored:
        remarks.append(unscored_remark(name, unscored))
    window = window_remark(name, plan, scores) if by_nats else None
    remarks += [window] if window is not None else []
    unit = plan.budget.unit if by_nats and plan.budget is not None else None
    if unit == "nominal":
        remarks.append("the plan's budget counts nominal bits, where scales are free; prices here are of stored bits")
    elif unit == "bytes":
        remarks.append("the plan's budget counts bytes at one context, window and all; prices here are of stored bits")
    recorded = plan.solver.predicted_kl_nats if plan.solver else None
    loss = predicted_kl(plan, scores) if by_nats and not unscored else None
    if recorded and loss is not None and not math.isclose(recorded, loss, rel_tol=0.01):
        remarks.append(
            f"the plan's file predicts a KL of {recorded:.4g} nats, these scores {loss:.4g}: "
            "they were calibrated since, or the plan was edited"
        )
    return remarks
