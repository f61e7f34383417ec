"""Plans and scores as a notebook shows them: a table of layers, K above V, in HTML that needs nothing else.

Reads records; returns text. All of a record's own words are escaped. Colours are transparent greys and blues over the
page's own, so that they can be read on a light page and on a dark one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from kvprof.records.formats import TENSORS
from kvprof.records.geometry import bytes_text
from kvprof.records.plan import BitPlan, TensorPlan
from kvprof.records.scores import LOSS_INCREASE, SCALAR_METRICS, Scores
from kvprof.records.words import context_text

_CELL = "padding:2px 6px;text-align:right;border:1px solid rgba(128,128,128,.35);color:inherit"
_HEAD = _CELL + ";font-weight:normal;opacity:.7"
_BLUE = "90,140,220"
_GREY = "128,128,128"


def plan_html(plan: BitPlan) -> str:
    """Return a plan: bits of every layer's K and V, shaded by their number, its formats on hovering; what it costs."""
    entries = {entry.layer: entry for entry in plan.layers}
    skipped = {entry.layer: entry.reason for entry in plan.skipped or ()}
    layers = range(plan.model.num_layers)
    rows = []
    for tensor in TENSORS:
        forms = [entries[layer].tensor(tensor) if layer in entries else None for layer in layers]
        cells = [_plan_cell(form, skipped.get(layer)) for layer, form in zip(layers, forms, strict=True)]
        rows.append((tensor[0].upper(), cells))
    title = f"bit plan for {plan.model.id or 'a model'}" + (f" by {plan.solver.method}" if plan.solver else "")
    return _page(title, [_table([str(layer) for layer in layers], rows)], _costs(plan))


def scores_html(scores: Scores) -> str:
    """Return scores: a table for each metric of one number a tensor, shaded by its share of the largest."""
    tables, lines = [], []
    layers = [str(entry.layer) for entry in scores.layers]
    for metric in SCALAR_METRICS:
        if metric not in scores.metrics:
            continue
        numbers = {name: [getattr(entry.tensor(name), metric) for entry in scores.layers] for name in TENSORS}
        largest = max((number for each in numbers.values() for number in each if number is not None), default=0.0)
        rows = [(name[0].upper(), [_score_cell(number, largest) for number in numbers[name]]) for name in TENSORS]
        tables.append(_table(layers, rows, metric))
    forms = {name: None for entry in scores.layers for t in TENSORS for name in entry.tensor(t).loss_increase or {}}
    if forms:
        lines.append(f"{LOSS_INCREASE} of {len(forms)} formats: {', '.join(forms)}")
    text = scores.calibration
    if text is not None:
        lines.append(f"on {text.sequences} sequences of {text.dataset}, {text.tokens} tokens, seed {text.seed}")
    of = scores.model.id if scores.model is not None and scores.model.id is not None else "a model"
    return _page(f"{scores.source or 'scores'} of {of}", tables, lines)


def _costs(plan: BitPlan) -> list[str]:
    """Return what a plan costs in every unit that it knows, and what it keeps in full precision."""
    lines = []
    budget = plan.budget
    if budget is not None:
        known = (
            (budget.nominal_bits, "nominal bits an element"),
            (budget.stored_bits, "stored bits an element"),
            (budget.bytes_per_token, "bytes a token"),
        )
        if parts := [f"{number:.6g} {unit}" for number, unit in known if number is not None]:
            lines.append("costs " + ", ".join(parts))
    if plan.geometry is not None:
        at = [f"{bytes_text(plan.bytes_at(context))} at {context_text(context)}" for context in plan.geometry.contexts]
        lines.append(f"cache of one sequence: {', '.join(at)} tokens")
    window = plan.window
    lines.append(f"in full precision: the first {window.sink_tokens} and the last {window.recent_tokens} tokens")
    if plan.solver is not None and plan.solver.predicted_kl_nats is not None:
        lines.append(f"predicted KL divergence: {plan.solver.predicted_kl_nats:.3g} nats a token")
    return lines


def _plan_cell(form: TensorPlan | None, reason: str | None) -> str:
    if form is None:
        return _cell("16", f"full precision: {reason}", _GREY, 0.12)
    recent = f", the last {form.recent_fraction:.0%} in full precision" if form.recent_fraction else ""
    # Of 16 bits, which a plan seldom has, no darker than of 8: the text must stay readable on any page.
    return _cell(str(form.bits), form.name + recent, _BLUE, 0.06 * min(form.bits, 8))


def _score_cell(number: float | None, largest: float) -> str:
    if number is None:
        return _cell("", "not measured", _GREY, 0)
    return _cell(f"{number:.3g}", repr(number), _BLUE, 0.48 * number / largest if largest else 0)


def _cell(text: str, title: str, colour: str, opacity: float) -> str:
    shade = f"{_CELL};background:rgba({colour},{opacity:.2f})"
    return f'<td title="{escape(title)}" style="{shade}">{escape(text)}</td>'


def _table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], caption: str | None = None) -> str:
    first = "".join(f'<th scope="col" style="{_HEAD}">{escape(head)}</th>' for head in ("layer", *heads))
    body = "".join(
        f'<tr><th scope="row" style="{_HEAD}">{escape(name)}</th>{"".join(cells)}</tr>' for name, cells in rows
    )
    named = "" if caption is None else f'<caption style="text-align:left;color:inherit">{escape(caption)}</caption>'
    return (
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse;color:inherit">{named}'
        f"<thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _page(title: str, tables: Iterable[str], lines: Iterable[str]) -> str:
    said = "".join(f"<div>{escape(line)}</div>" for line in lines)
    return f'<div style="color:inherit;background:transparent"><b>{escape(title)}</b>{"".join(tables)}{said}</div>'
