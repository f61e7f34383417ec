"""Two plans side by side, printed: the tensors that moved, the settings that differ, what it all costs.

Reads a Comparison, prints it through `console`; knows nothing of how it was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from kvprof.records.comparison import Comparison, Direction, TensorChange
from kvprof.records.formats import USUAL_AXIS, TensorWord
from kvprof.records.geometry import bytes_text
from kvprof.records.plan import TensorPlan
from kvprof.records.words import context_text
from kvprof.report.console import Table, print_note, print_plain

WORDS: dict[Direction, str] = {
    "up": "to more stored bits",
    "down": "to fewer",
    "level": "to another format of the same stored bits",
}


def show_comparison(comparison: Comparison) -> None:
    """Print what differs between two plans, then what each costs; that they store the same where they do."""
    first, second = comparison.first, comparison.second
    if comparison.changes:
        _show_changes(comparison)
    print_plain(comparison_verdict(comparison), style="bold")
    for setting in comparison.settings:
        print_plain(f"{setting.name}: {setting.before} -> {setting.after}")
    table = Table(f"what they cost: {first.name} and {second.name}", ("", "before", "after", "change"), left=[0])
    for label, cells in _cost_rows(comparison):
        table.add(label, *cells)
    table.print()
    for remark in comparison.remarks:
        print_note(remark)


def comparison_verdict(comparison: Comparison) -> str:
    """Return one line on how many tensors moved, and where to."""
    if comparison.same:
        return f"both plans store the same: {comparison.tensors} tensors in the same formats, the same settings"
    if not comparison.changes:
        return f"no tensor moved: all {comparison.tensors} have the same format in both plans"
    counts = Counter(change.direction for change in comparison.changes)
    parts = ", ".join(f"{counts[direction]} {WORDS[direction]}" for direction in WORDS if counts[direction])
    return f"{len(comparison.changes)} of {comparison.tensors} tensors moved: {parts}"


def format_text(form: TensorPlan, tensor: TensorWord) -> str:
    """Return a format's name with what the name leaves out: an unusual axis, a share of the recent past kept."""
    if form.is_full:
        return form.name
    usual = USUAL_AXIS["value" if tensor == "value" else "key"]  # the parts of a latent are stored as keys are
    axis = f" per {form.axis}" if form.scheme == "asymmetric" and form.axis != usual else ""
    recent = f" recent {form.recent_fraction:.0%}" if form.recent_fraction else ""
    return form.name + axis + recent


def _show_changes(comparison: Comparison) -> None:
    title = f"from {comparison.first.name} to {comparison.second.name}"
    predicted = any(change.predicted_change_nats is not None for change in comparison.changes)
    headings = ["layer", "tensor", "before", "after", "", "stored\nbits", "change"]
    table = Table(title, [*headings, "predicted KL\n1e-3 nats"] if predicted else headings, left=[1, 2, 3, 4])
    for change in comparison.changes:
        table.add(*_change_cells(change), *([_milli(change.predicted_change_nats)] if predicted else []))
    table.print()


def _change_cells(change: TensorChange) -> list[str]:
    added = change.stored_bits_after - change.stored_bits_before
    return [
        str(change.layer),
        change.tensor,
        format_text(change.before, change.tensor),
        format_text(change.after, change.tensor),
        change.direction,
        f"{change.stored_bits_after:.4g}",
        f"{added:+.4g}" if added else "0",
    ]


def _milli(nats: float | None) -> str:
    return "-" if nats is None else f"{1e3 * nats:+.3g}"


def _cost_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    plans = (comparison.first, comparison.second)
    rows = [
        _row("nominal bits an element", [plan.nominal_bits for plan in plans], "{:.4f}".format),
        _row("stored bits an element", [plan.stored_bits for plan in plans], "{:.4f}".format),
        _row("bytes a token", [plan.bytes_per_token for plan in plans], "{:.6g}".format),
    ]
    for context in comparison.first.bytes_at or ():
        held = [(plan.bytes_at or {}).get(context) for plan in plans]
        rows.append(_row(f"bytes at {context_text(context)} context", held, bytes_text))
    rows.append(_row("predicted KL, nats a token", [plan.predicted_kl_nats for plan in plans], "{:.4g}".format))
    errors = [*(plan.predicted_kl_stderr_nats for plan in plans), comparison.predicted_change_stderr_nats]
    if any(error is not None for error in errors):
        rows.append(("  its standard error", ["-" if error is None else f"{error:.2g}" for error in errors]))
    return rows


def _row(label: str, numbers: Sequence[float | None], text: Callable[[float], str]) -> tuple[str, list[str]]:
    """Return a label and the cells of both plans and of the change, with its share of the first."""
    before, after = numbers
    cells = ["-" if value is None else text(value) for value in (before, after)]
    if before is None or after is None:
        return label, [*cells, "-"]
    if before == after:
        return label, [*cells, "0"]
    share = f" ({(after - before) / before:+.1%})" if before else ""
    return label, [*cells, ("+" if after > before else "") + text(after - before) + share]
