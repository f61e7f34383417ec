"""The terminal: tables, verdicts, errors, progress. The only importer of rich.

Reads records; knows nothing of how they were made. Tables fit 80 columns; results go to stdout, all else to stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import KVLayer, bytes_text
from kvprof.records.inventory import Inventory
from kvprof.records.plan import BitPlan, TensorPlan
from kvprof.records.scores import Scores

CONTEXTS = (4096, 32768, 131072)

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_error(error: BaseException) -> None:
    """Print what went wrong, plainly."""
    err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)


def print_note(text: str) -> None:
    """Print a remark that is no result: to stderr, so that it never mixes with one."""
    err.print(Text(text, style="yellow"), soft_wrap=True)


def print_written(path: Path) -> None:
    """Say where a result went."""
    print_plain(f"written to {path}")


def print_plain(text: str | Text, style: str = "") -> None:
    """Print a line of prose as it is: the terminal may wrap it, a pipe gets it whole."""
    out.print(text if isinstance(text, Text) else Text(text, style=style), soft_wrap=True)


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the time left while the `with` lasts, where stderr is a terminal; yields its (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_inventory(inventory: Inventory) -> None:
    """Print the cache of every layer, its bytes, the layers a plan leaves alone and the red flags."""
    geometry = inventory.geometry
    table = _table(f"KV cache of {inventory.model.id} ({inventory.model.architecture}, {geometry.dtype})")
    for heading in ("layer", "kind", "KV heads", "head dim K", "V", "width K", "V", "bytes/token"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for layer in geometry.layers:
        table.add_row(
            *_cells(layer), str(geometry.bytes_per_token(layer)), style=None if layer.skipped is None else "dim"
        )
    out.print(table)
    growing = [layer for layer in geometry.layers if layer.has_projections and layer.window is None]
    total = sum(geometry.bytes_per_token(layer) for layer in growing)
    print_plain(
        f"each token adds {total} bytes ({bytes_text(total)}) in {len(growing)} of {geometry.num_layers} layers"
    )
    print_plain(
        "  ".join(f"{context // 1024}k context: {bytes_text(geometry.bytes_at(context))}" for context in CONTEXTS)
    )
    for reason, layers in _by_reason(geometry.layers):
        print_plain(f"left alone by a plan: {_layers_text(layers)}: {reason}")
    show_red_flags(inventory)
    if not inventory.red_flags:
        print_plain("no red flags")


def show_red_flags(inventory: Inventory) -> None:
    """Print each red flag with the layers it concerns and one line of why it matters."""
    for flag in inventory.red_flags:
        everywhere = len(flag.layers) == len(inventory.geometry.scored)
        where = "every layer" if everywhere else _layers_text(flag.layers)
        print_plain(Text.assemble(("red flag ", "bold red"), (flag.name, "bold"), f" ({where}): {flag.why}"))


def show_scores(scores: Scores) -> None:
    """Print every metric of a Scores file, layer by layer, and what can be said of it."""
    title = f"{scores.source or 'scores'} of {scores.model.id if scores.model and scores.model.id else 'a model'}"
    if scores.calibration is not None:
        text = scores.calibration
        title += f" on {text.sequences} sequences, {text.tokens} tokens of {text.dataset}"
    if "spectral_norm" in scores.metrics and "frobenius_norm" in scores.metrics:
        _show_norms(scores, title)
    if "gradient_norm" in scores.metrics:
        _show_gradients(scores, title)
    if not scores.metrics:
        print_plain(f"{title}: {len(scores.layers)} layers; no metric that every layer has")
    elif set(scores.metrics) < {"spectral_norm", "frobenius_norm"}:
        _show_single(scores, scores.metrics[0], title)
    for remark in score_remarks(scores):
        print_note(remark)


def score_remarks(scores: Scores, metrics: Sequence[str] | None = None) -> list[str]:
    """Return a sentence for each metric that cannot tell which layers need bits, and why."""
    remarks = [
        f"{metric} of the {tensor}s varies by less than 1 % over all layers: it carries no information to rank them by"
        for metric in metrics or scores.metrics
        for tensor in TENSORS
        if scores.is_flat(metric, tensor)
    ]
    norms = [metric for metric in metrics or scores.metrics if metric != "gradient_norm"]
    if norms and any(entry.key.gain_rms is not None for entry in scores.layers):
        remarks.append("keys are normalised after k_proj: their weight norm says nothing about the cache's scale")
    return remarks


def plan_remarks(plan: BitPlan, scores: Scores) -> list[str]:
    """Return what a reader of a new plan should know: blind scores, a rule without a budget, layers left alone."""
    metric = plan.solver.metric if plan.solver else None
    remarks = score_remarks(scores, [metric]) if metric else []
    if plan.budget is not None and plan.budget.requested is None and plan.solver is not None:
        remarks.append(f"the rule {plan.solver.method} takes no budget: its bits are what the rule says")
    return remarks


def norm_verdict(scores: Scores) -> str:
    """Return one line on the key-value norm disparity: in how many layers K exceeds V, in each norm."""
    counts = {}
    for metric in ("spectral_norm", "frobenius_norm"):
        keys, values = _numbers(scores, metric, "key"), _numbers(scores, metric, "value")
        counts[metric] = sum(key > value for key, value in zip(keys, values, strict=True))
    total = len(scores.layers)
    spectral, frobenius = counts["spectral_norm"], counts["frobenius_norm"]
    if spectral == frobenius == total:
        moral = "keys are larger everywhere, as arXiv 2502.15075 expects"
    elif spectral == frobenius == 0:
        moral = "values are larger everywhere, against arXiv 2502.15075"
    else:
        moral = "the key-value norm disparity is not universal"
    return f"spectral K > V in {spectral} of {total} layers, Frobenius K > V in {frobenius} of {total}: {moral}"


def show_plan(plan: BitPlan) -> None:
    """Print a plan: the format of every layer's K and V, then what it costs in every unit."""
    table = _table(f"bit plan for {plan.model.id or 'a model'}" + (f" by {plan.solver.method}" if plan.solver else ""))
    table.add_column("layer", justify="right")
    for tensor in TENSORS:
        table.add_column(f"{tensor} bits", justify="right")
        table.add_column("format")
        table.add_column("")
    skipped = {entry.layer: entry.reason for entry in plan.skipped or ()}
    entries = {entry.layer: entry for entry in plan.layers}
    for layer in range(plan.model.num_layers):
        if layer in skipped:
            table.add_row(str(layer), "16", "full", skipped[layer], style="dim")
            continue
        cells = [cell for tensor in TENSORS for cell in _plan_cells(entries[layer].tensor(tensor))]
        table.add_row(str(layer), *cells)
    out.print(table)
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
            parts.append(f"{budget.stored_bits:.4g} stored bits ({16 / budget.stored_bits:.2f} times fewer than 16)")
        if budget.bytes_per_token is not None:
            parts.append(f"{budget.bytes_per_token:g} bytes a token")
        lines.append("costs: " + ", ".join(parts))
    for tensor in TENSORS:
        bits = [entry.tensor(tensor).bits for entry in plan.layers]
        lines.append(f"mean {tensor} bits over {len(bits)} layers: {sum(bits) / len(bits):.4f}")
    window = plan.window
    lines.append(f"in full precision: the first {window.sink_tokens} tokens and the last {window.recent_tokens}")
    if plan.geometry is not None:
        for context in CONTEXTS:
            planned, full = plan.bytes_at(context), plan.geometry.bytes_at(context)
            smaller = f"{full / planned:.2f} times smaller than {plan.geometry.dtype}" if planned else ""
            lines.append(f"{context // 1024}k context: {bytes_text(planned)}, {smaller}")
    if plan.solver is not None and plan.solver.objective is not None:
        proof = "the least of all plans within the budget" if plan.solver.optimal else "not claimed to be the least"
        lines.append(f"objective {plan.solver.objective:.6g} ({plan.solver.metric}): {proof}")
    return lines


def _show_norms(scores: Scores, title: str) -> None:
    table = _table(title)
    table.add_column("layer", justify="right")
    for norm in ("spectral", "frobenius"):
        for heading in (f"{norm[:4]}.\nK", f"{norm[:4]}.\nV", "\nK/V"):
            table.add_column(heading, justify="right")
        table.add_column("more\nin", justify="center")
    for tensor in ("K", "V"):
        table.add_column(f"rank\n{tensor}", justify="right")
    for entry in scores.layers:
        cells = [str(entry.layer)]
        for metric in ("spectral_norm", "frobenius_norm"):
            key, value = getattr(entry.key, metric), getattr(entry.value, metric)
            ratio = f"{key / value:#.3g}" if value else "-"
            cells += [_number(key), _number(value), ratio, "=" if key == value else "K" if key > value else "V"]
        cells += [_number(entry.key.stable_rank), _number(entry.value.stable_rank)]
        table.add_row(*cells)
    out.print(table)
    if any(entry.key.bias_norm or entry.key.gain_rms is not None for entry in scores.layers):
        _show_extras(scores)
    print_plain("spec.: largest singular value; frob.: root of the sum of squares; rank: stable rank", style="dim")
    print_plain(norm_verdict(scores), style="bold")


def _show_extras(scores: Scores) -> None:
    """Print biases and gains, which the weight norm does not see."""
    table = _table("beside the weights")
    for heading in ("layer", "K bias norm", "V bias norm", "k_norm gain, rms", "largest"):
        table.add_column(heading, justify="right")
    for entry in scores.layers:
        key = entry.key
        table.add_row(
            str(entry.layer), *map(_number, (key.bias_norm, entry.value.bias_norm, key.gain_rms, key.gain_max))
        )
    out.print(table)


def _show_gradients(scores: Scores, title: str) -> None:
    table = _table(title)
    table.add_column("layer", justify="right")
    for tensor in ("K", "V"):
        table.add_column(f"{tensor} gradient norm", justify="right")
        table.add_column("± stderr", justify="right")
        table.add_column("rank", justify="right")
    ranks = {tensor: _ranks(_numbers(scores, "gradient_norm", tensor)) for tensor in TENSORS}
    for row, entry in enumerate(scores.layers):
        cells = [str(entry.layer)]
        for tensor in TENSORS:
            found = entry.tensor(tensor)
            cells += [_number(found.gradient_norm), _number(found.gradient_norm_stderr), str(ranks[tensor][row])]
        table.add_row(*cells)
    out.print(table)


def _show_single(scores: Scores, metric: str, title: str) -> None:
    table = _table(title)
    for heading in ("layer", f"{metric} K", "V"):
        table.add_column(heading, justify="right")
    for entry in scores.layers:
        table.add_row(str(entry.layer), _number(getattr(entry.key, metric)), _number(getattr(entry.value, metric)))
    out.print(table)


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _cells(layer: KVLayer) -> list[str]:
    kind = layer.kind + (f" {layer.window}" if layer.window else "")
    if not layer.has_projections:
        return [str(layer.layer), kind, "-", "-", "-", "-", "-"]
    numbers = (layer.kv_heads, layer.key_head_dim, layer.value_head_dim, layer.key_width, layer.value_width)
    return [str(layer.layer), kind, *map(str, numbers)]


def _plan_cells(form: TensorPlan) -> list[str]:
    recent = f" recent {form.recent_fraction:.0%}" if form.recent_fraction else ""
    return [str(form.bits), form.name + recent, "█" * form.bits if form.bits <= 8 else "█" * 8 + "…"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.4g}"


def _numbers(scores: Scores, metric: str, tensor: TensorName) -> list[float]:
    return [score for _, name, score in scores.metric(metric) if name == tensor]


def _ranks(numbers: list[float]) -> list[int]:
    order = sorted(range(len(numbers)), key=lambda index: -numbers[index])
    ranks = [0] * len(numbers)
    for rank, index in enumerate(order, start=1):
        ranks[index] = rank
    return ranks


def _by_reason(layers: Sequence[KVLayer]) -> list[tuple[str, list[int]]]:
    reasons: dict[str, list[int]] = {}
    for layer in layers:
        if layer.skipped is not None:
            reasons.setdefault(layer.skipped, []).append(layer.layer)
    return list(reasons.items())


def _layers_text(layers: Sequence[int]) -> str:
    """Return layer numbers with their runs shortened: layers 0-4, 6."""
    runs = []
    for _, group in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(runs)}"
