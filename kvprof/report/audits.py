"""Scores held against measurements, printed: single tensors, ranks and ratios, whole plans.

Reads records, prints them through `console`; knows nothing of how they were made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kvprof.records.audit import Agreement, Audit, PlanCheck, RatioSpread
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.scores import KlCalibration, Scores
from kvprof.records.words import counted
from kvprof.report.console import Table, print_note, print_plain, print_written
from kvprof.report.plots.audit import audit_figure, audit_labels
from kvprof.report.plots.style import MissingMatplotlib, save_figure

COLUMNS = 4
"""Formats that stand beside each other in 100 columns."""


def show_divergence(scores: Scores) -> None:
    """Print the measured divergence of each tensor in each format."""
    table_title = f"measured divergence of {_model(scores)}, one tensor at a time"
    text, decoding = scores.calibration, scores.decoding
    if text is not None and decoding is not None:
        table_title += (
            f"\n{counted(text.sequences, 'sequence')}, the last {decoding.suffix_fraction:.0%} "
            f"of each ({decoding.tokens} tokens) of {text.dataset}; sinks {decoding.window.sink_tokens}, "
            f"window {decoding.window.recent_tokens}"
        )
    columns = [
        (tensor, name)
        for tensor in TENSORS
        for name in dict.fromkeys(name for entry in scores.layers for name in entry.tensor(tensor).loss_increase or {})
    ]
    for chosen in _tables(columns):
        headings = [f"{tensor}s {name}\n1e-3 nats/token" for tensor, name in chosen]
        table = Table(table_title, ("layer", *headings))
        for entry in scores.layers:
            cells = []
            for tensor, name in chosen:
                found = entry.tensor(tensor)
                cells.append(
                    _milli((found.loss_increase or {}).get(name), (found.loss_increase_stderr or {}).get(name))
                )
            if set(cells) != {"-"}:
                table.add(str(entry.layer), *cells)
        table.print()


def show_calibration(plans: Sequence[PlanCheck], found: KlCalibration) -> None:
    """Print each plan's predicted and measured KL, their ratio, and what is left of it after the factor."""
    where = f"{counted(found.sequences, 'sequence')} of {plans[0].text}"
    table = Table(
        f"measured KL of whole plans, nats a token, on {where}",
        ("plan", "stored\nbits", "predicted", "measured\n± stderr", "measured /\npredicted", "after the\nfactor"),
        left=[0],
    )
    for plan in sorted(plans, key=lambda plan: plan.stored_bits):
        ratio = plan.ratio
        table.add(
            plan.name,
            f"{plan.stored_bits:.3f}",
            _nats(plan.predicted_kl_nats),
            _nats(plan.measured_kl_nats) + _error(plan.measured_kl_stderr_nats),
            "-" if ratio is None else f"{ratio:.2f}",
            "-" if ratio is None else f"{ratio / found.factor:.2f}",
        )
    table.print()
    print_plain(
        f"factor {found.factor:.3f}, fitted to {counted(found.plans, 'plan')}; after it, measured "
        f"and predicted KL differ by {found.spread:.2f} times at most",
        style="bold",
    )


def show_audit(audit: Audit) -> None:
    """Print ranks and ratios for each width of code, then whole plans, then remarks."""
    for bits in dict.fromkeys(agreement.bits for agreement in audit.agreements):
        _show_ranks(audit, [agreement for agreement in audit.agreements if agreement.bits == bits], bits)
    if audit.ratios:
        _show_ratios(audit.ratios)
    if audit.plans:
        _show_plans(audit)
    for remark in audit.remarks:
        print_note(remark)


def show_pictures(audit: Audit, folder: Path) -> None:
    """Draw each loss_increase of an audit against what was measured, and say where; without matplotlib, say that."""
    labels = audit_labels(audit)
    for old in folder.glob("audit*.png"):  # of an audit that is no more
        old.unlink()
    names = ["audit.png"] if len(labels) == 1 else [f"audit-{number}.png" for number in range(1, len(labels) + 1)]
    for label, name in zip(labels, names, strict=True):
        try:
            print_written(save_figure(audit_figure(audit, label), folder / name))
        except MissingMatplotlib as error:
            print_note(f"no picture: {error}")
            return


def _show_ranks(audit: Audit, agreements: Sequence[Agreement], bits: int) -> None:
    """Print a line a metric: its rank correlation with what was measured, over all tensors and group by group."""
    groups = list(dict.fromkeys(agreement.group for agreement in agreements))
    sizes = {group: max(one.tensors for one in agreements if one.group == group) for group in groups}
    heads = [f"{'all' if place == 0 else group}\n({sizes[group]})" for place, group in enumerate(groups)]
    width = counted(bits, "bit")
    title = f"rank correlation (Spearman) with measured divergence at {width}: {_model(audit)}"
    table = Table(title, ("metric", *heads), left=[0])
    found = {(agreement.label, agreement.group): agreement.spearman for agreement in agreements}
    for label in dict.fromkeys(agreement.label for agreement in agreements):
        numbers = [found.get((label, group)) for group in groups]
        table.add(label, *("-" if number is None else f"{number:.3f}" for number in numbers))
    table.print()


def _show_ratios(ratios: Sequence[RatioSpread]) -> None:
    labels = list(dict.fromkeys(spread.label for spread in ratios))
    for label in labels:
        title = f"{label}: predicted over measured, tensor by tensor"
        table = Table(title, ("", "tensors", "median", "10 %", "90 %", "worst", "of"), left=[0, 6])
        for spread in (spread for spread in ratios if spread.label == label):
            numbers = (spread.median, spread.low, spread.high, spread.worst)
            of = f"{spread.worst_tensor} of layer {spread.worst_layer}"
            table.add(spread.group, str(spread.tensors), *(f"{number:#.3g}" for number in numbers), of)
        table.print()


def _show_plans(audit: Audit) -> None:
    headings = ("plan", "stored\nbits", "predicted\nnats/token", "measured\n± stderr", "pred. /\nmeas.", "text")
    table = Table("whole plans: predicted KL and what evaluate measured", (*headings, "from"), left=[0, 5])
    for plan in audit.plans:
        ratio = plan.ratio
        table.add(
            plan.name,
            f"{plan.stored_bits:.3f}",
            _nats(plan.predicted_kl_nats),
            _nats(plan.measured_kl_nats) + _error(plan.measured_kl_stderr_nats),
            "-" if ratio is None else f"{1 / ratio:.2f}",
            plan.text or "-",
            "-" if plan.measured_from is None else str(plan.measured_from),
        )
    table.print()
    if audit.kl_calibration is not None:
        print_plain(f"predictions hold the factor {audit.kl_calibration.factor:.3f} that kvprof calibrate found")
    else:
        print_plain("predictions hold no factor: kvprof calibrate measures one")


def _tables(columns: Sequence[tuple[TensorName, str]]) -> Iterator[Sequence[tuple[TensorName, str]]]:
    """Yield the columns of each table: all in one where they fit, else keys and values apart, a few at a time."""
    if len(columns) <= COLUMNS:
        yield columns
        return
    for tensor in TENSORS:
        own = [column for column in columns if column[0] == tensor]
        for start in range(0, len(own), COLUMNS):
            yield own[start : start + COLUMNS]


def _model(found: Scores | Audit) -> str:
    return found.model.id if found.model is not None and found.model.id else "a model"


def _nats(kl: float) -> str:
    return f"{kl:#.3g}"


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:#.2g}"


def _milli(nats: float | None, stderr: float | None) -> str:
    if nats is None:
        return "-"
    return f"{1e3 * nats:#.3g}" + ("" if stderr is None else f" ± {1e3 * stderr:#.2g}")
