"""A BitPlan printed: the format of every tensor, what it costs, what it is predicted to lose, what to know of it.

Reads records, prints them through `console`; knows nothing of how they were made.
"""

from __future__ import annotations

from kvprof.errors import UsageError
from kvprof.records.external_formats import EXTERNAL
from kvprof.records.formats import TENSORS, format_named
from kvprof.records.geometry import bytes_text
from kvprof.records.plan import BitPlan, Solver, TensorPlan, Window
from kvprof.records.requests.plan import AllocateRequest
from kvprof.records.scores import LOSS_INCREASE, CalibrationInfo, Scores
from kvprof.records.stability import Stability
from kvprof.records.words import context_text, counted
from kvprof.report.console import Table, print_plain
from kvprof.report.sentences import indexer_remark, latent_remarks, score_remarks, state_remarks


def show_plan(plan: BitPlan) -> None:
    """Print a plan: the format of every layer's K and V, then what it costs in every unit."""
    title = f"bit plan for {plan.model.id or 'a model'}" + (f" by {plan.solver.method}" if plan.solver else "")
    headings = ("layer", "key bits", "format", "", "value bits", "format", "")
    table = Table(title, headings, left=[2, 3, 5, 6])
    skipped = {entry.layer: entry.reason for entry in plan.skipped or ()}
    entries = {entry.layer: entry for entry in plan.layers}
    for layer in range(plan.model.num_layers):
        if layer in skipped:
            table.add(str(layer), "16", "full", skipped[layer], style="dim")
        else:
            cells = [cell for tensor in TENSORS for cell in _format_cells(entries[layer].tensor(tensor))]
            table.add(str(layer), *cells)
    table.print()
    for line in plan_lines(plan):
        print_plain(line)


def plan_lines(plan: BitPlan) -> list[str]:
    """Return what a plan costs, in sentences: all three units of its budget, and its bytes at some contexts."""
    lines = []
    budget = plan.budget
    if budget is not None:
        if budget.requested is not None:
            in_bytes = budget.unit == "bytes"
            what = bytes_text(budget.requested) if in_bytes else f"{budget.requested:g} {budget.unit} bits an element"
            lines.append(f"asked for: {what}")
        parts = []
        if budget.nominal_bits is not None:
            parts.append(f"{budget.nominal_bits:.4g} nominal bits an element")
        if budget.stored_bits is not None:
            parts.append(f"{budget.stored_bits:.4g} stored bits{_times_fewer(budget.stored_bits)}")
        if budget.bytes_per_token is not None:
            parts.append(f"{budget.bytes_per_token:g} bytes a token")
        lines.append("costs: " + ", ".join(parts))
    for tensor in TENSORS:
        bits = [entry.tensor(tensor).bits for entry in plan.layers]
        over = counted(len(bits), "layer")
        lines.append(f"mean {tensor} bits over {over}: {sum(bits) / len(bits):.4f}")
    lines += [*latent_remarks(plan.geometry), *state_remarks(plan.geometry)]
    window = plan.window
    first = f"the first {window.sink_tokens} tokens" if window.sink_tokens else ""
    last = f"the last {window.recent_tokens}{'' if first else ' tokens'}" if window.recent_tokens else ""
    lines.append("in full precision: " + (" and ".join(part for part in (first, last) if part) or "no token"))
    if plan.geometry is not None:
        for context in plan.geometry.contexts:
            planned, full = plan.bytes_at(context), plan.geometry.bytes_at(context)
            smaller = f"{full / planned:.2f} times smaller than {plan.geometry.dtype}" if planned else ""
            lines.append(f"{context_text(context)} context: {bytes_text(planned)}, {smaller}")
    predicted = prediction_text(plan)
    if predicted is not None:
        lines.append(predicted)
    if plan.solver is not None and plan.solver.objective is not None:
        least = "the least of all plans within the budget"
        if budget is not None and budget.requested is None and plan.solver.method == "exact":
            least = "the plan is the cheapest of all that are predicted to stay below what was asked for"
        if plan.solver.target is not None:
            least += f" that {plan.solver.target} can be told"
        proof = least if plan.solver.optimal else _gap(plan.solver)
        lines.append(f"objective {plan.solver.objective:.6g} ({plan.solver.metric}): {proof}")
    return lines


def prediction_text(plan: BitPlan) -> str | None:
    """Return the KL divergence that a plan is predicted to have, in words; None where it has no prediction."""
    solver = plan.solver
    if solver is None or solver.predicted_kl_nats is None:
        return None
    kl, stderr = solver.predicted_kl_nats, solver.predicted_kl_stderr_nats
    text = f"predicted: {kl_text(kl, stderr)} nats a token of KL divergence"
    if solver.kl_factor is None:
        return f"{text} (not fitted: kvprof calibrate measures whole plans)"
    return f"{text} (fitted: {solver.kl_factor:.3g} times what the scores predict)"


def _gap(solver: Solver) -> str:
    """Return how near to the least an objective is known to be."""
    if solver.lower_bound is None or not solver.objective or solver.lower_bound <= 0:
        return "not claimed to be the least"
    return f"at most {solver.objective / solver.lower_bound - 1:.1%} above the least within the budget"


def kl_text(kl: float, stderr: float | None) -> str:
    """Return a predicted KL divergence with its standard error, where that is known."""
    return (f"{kl:#.3g}" if kl else "0") + (f" ± {stderr:#.2g}" if stderr else "")


def _shows(part: float, nats: float) -> bool:
    """Whether a prediction would be printed as another number without a part of it."""
    return kl_text(nats, None) != kl_text(nats - part, None)


def restriction_lines(plan: BitPlan, unrestricted: BitPlan) -> list[str]:
    """Return what a runtime's constraints cost: a plan within them beside the best one that stores no more bits."""
    # What the choice made of noise is known of the unrestricted plan alone.
    kl, free = (
        None
        if each.solver is None or each.solver.predicted_kl_nats is None
        else each.solver.predicted_kl_nats - (each.solver.selection_nats or 0.0)
        for each in (plan, unrestricted)
    )
    if kl is None or free is None or plan.solver is None or unrestricted.budget is None:
        return []
    stored = unrestricted.budget.stored_bits
    times = f", {kl / free:.3g} times as much" if free else ""
    return [
        f"price of the restriction: {kl - free:.3g} nats a token{times}; within {plan.solver.target} {kl:.4g} nats, "
        f"with any scored format for any tensor {free:.4g} nats at {stored:.4g} stored bits"
    ]


def stability_lines(stability: Stability | None) -> list[str]:
    """Return what other calibration sequences would have changed of a plan, in sentences; none where it is unknown."""
    if stability is None:
        return []
    return [
        f"by a resample of the {stability.sequences} calibration sequences {stability.changed_mean:.1f} of "
        f"{stability.tensors} tensors would have another format on average; {stability.changed_p90:.0f} or fewer in 9 "
        "of 10",
    ]


def prediction_lines(plan: BitPlan, scores: Scores, best_pair: tuple[str, float] | None) -> list[str]:
    """Return what a plan's predicted KL speaks of, what is in it, and what the best uniform pair would cost.

    best_pair: its name and predicted KL, in nats a token.
    """
    solver, lines = plan.solver, []
    if solver is None or solver.predicted_kl_nats is None:
        return []
    if scores.calibration is not None:
        lines.append(
            f"the prediction speaks of text like {text_name(scores.calibration)}; text of another kind can be twice as "
            "hard"
        )
    if solver.kl_factor is not None and scores.kl_calibration is not None:
        lines.append(
            f"it is fitted to {counted(scores.kl_calibration.plans, 'plan')} measured on "
            f"{counted(scores.kl_calibration.sequences, 'sequence')} of that text"
        )
    if solver.selection_nats is not None and _shows(solver.selection_nats, solver.predicted_kl_nats):
        lines.append(
            f"{solver.selection_nats:.3g} nats of it are for the plan having been chosen by the sequences that predict "
            "it, found by leaving sequences out"
        )
    if best_pair is not None:
        name, nats = best_pair
        own = solver.predicted_kl_nats - (solver.selection_nats or 0.0)  # a pair is not chosen by its noise
        times = f", {nats / own:.3g} times as much" if own > 0 else ""
        lines.append(f"best plain pair at no more bits: {name}, predicted {nats:.3g} nats a token{times}")
    return lines


def bytes_line(plan: BitPlan, request: AllocateRequest) -> str:
    """Return the bytes of a plan's cache at the context that was asked for."""
    context, batch = request.context or 0, request.batch or 1
    held = plan.bytes_at(context, batch)
    asked = "" if request.memory is None else f", of {request.memory} asked for"
    return f"{held} bytes ({bytes_text(held)}) at {context} tokens x {batch}{asked}"


def text_name(text: CalibrationInfo) -> str:
    """Return the name of a text with its split, as `builtin (calibration)`."""
    return text.dataset + (f" ({text.split})" if text.split else "")


def plan_remarks(plan: BitPlan, scores: Scores) -> list[str]:
    """Return what a reader of a new plan should know of its scores, its window and its rule."""
    solver = plan.solver
    if solver is None:
        return []
    remarks = score_remarks(scores, [solver.metric]) if solver.metric else []
    if solver.metric == LOSS_INCREASE:
        remarks += loss_remarks(scores, plan.window, solver.target is not None)
        if (unseen := indexer_remark(plan.geometry)) is not None:
            remarks.append(unseen)
        if solver.predicted_kl_nats is None:
            remarks.append("not all of these formats were scored, so no KL is predicted")
    elif solver.method == "exact" and (lacking := _partly_predicted(scores)):
        remarks.append(
            f"planned by {solver.metric}: {LOSS_INCREASE} is there for some tensors, not for the {lacking}; "
            "`kvprof gradients` predicts it for all"
        )
    if plan.budget is not None and plan.budget.requested is None and solver.method != "exact":
        remarks.append(f"the rule {solver.method} takes no budget: its bits are what the rule says")
    return remarks


def _partly_predicted(scores: Scores) -> str | None:
    """Return the first tensor without predicted losses, where others have them."""
    having = {
        (entry.layer, name): entry.tensor(name).has(LOSS_INCREASE) for entry in scores.planned for name in TENSORS
    }
    if not any(having.values()):
        return None
    return next((f"{name} of layer {layer}" for (layer, name), has in having.items() if not has), None)


def loss_remarks(scores: Scores, window: Window, for_target: bool = False) -> list[str]:
    """Return what a reader should know of plans made by `loss_increase`, of this window."""
    remarks = []
    scored = dict.fromkeys(name for tensor in TENSORS for name in scores.scored_formats(tensor))
    external = [name for name in scored if name in EXTERNAL]
    if external and not for_target:
        names = ", ".join(external)
        remarks.append(f"passed over, as no plan of kvprof's can store them: {names} (other runtimes': see --target)")
    unknown = [name for name in scores.passed_over if not _is_format(name)]
    unfit = [name for name in scores.passed_over if _is_format(name)]
    if unknown:
        remarks.append(f"passed over, as no plan of kvprof's can store them: {', '.join(unknown)}")
    if unfit:
        why = "the scores do not say the head dimension" if scores.geometry is None else "some heads cannot have them"
        remarks.append(f"passed over where {why}: {', '.join(unfit)}")
    if scores.decoding is not None and scores.decoding.window != window:
        remarks.append(
            f"the scores were measured with {_window_text(scores.decoding.window)} in full precision, the plan keeps "
            f"{_window_text(window)}: the predicted KL is of the former"
        )
    return remarks


def _format_cells(form: TensorPlan) -> list[str]:
    recent = f" recent {form.recent_fraction:.0%}" if form.recent_fraction else ""
    return [str(form.bits), form.name + recent, "█" * form.bits if form.bits <= 8 else "█" * 8 + "…"]


def _times_fewer(stored_bits: float) -> str:
    """Return the compression; nothing for a file edited by hand that stores nothing."""
    return f" ({16 / stored_bits:.2f} times fewer than 16)" if stored_bits > 0 else ""


def _is_format(name: str) -> bool:
    """Whether a name says a format that some heads can have."""
    try:
        format_named(name, "value", head_dim=64)
    except UsageError:
        return False
    return True


def _window_text(window: Window) -> str:
    return f"the first {window.sink_tokens} and the last {window.recent_tokens} tokens"
