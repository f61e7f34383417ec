"""Predicted losses as tables: the best of each width for whoever has just measured them, every format for who asks.

Reads Scores, prints them through `console`; knows nothing of how they were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvprof.errors import UsageError
from kvprof.records.formats import TENSORS, TensorName, format_named
from kvprof.records.scores import AnyLayerScores, Scores
from kvprof.records.words import counted
from kvprof.report.console import Table, print_plain

MILLINATS = 1e3
FORMATS_A_TABLE = 6
WIDTHS = (1, 2, 3, 4)
"""The widths of codes that plans are made of; beyond, all is cheap."""


def show_best_losses(scores: Scores) -> None:
    """Print what each layer's keys and values cost in the best format of each width, in 80 columns."""
    columns: list[tuple[TensorName, int, Sequence[str]]] = []
    for tensor in TENSORS:
        names = _names(scores, tensor)
        for bits in WIDTHS:
            of_width = [name for name in names if _bits(name, tensor) == bits]
            if of_width:
                columns.append((tensor, bits, of_width))
    if not columns:
        return
    headings = [f"{'K' if tensor == 'key' else 'V'}\n{counted(bits, 'bit')}" for tensor, bits, _ in columns]
    table = Table(f"predicted loss of {_title(scores)}: 10^-3 nats a token", ("layer", *headings))
    for entry in scores.layers:
        found = [_least(entry, tensor, names) for tensor, _, names in columns]
        if any(loss is not None for loss in found):
            table.add(str(entry.layer), *map(_millinats, found))
    table.print()
    numbers = ", ".join(f"{len(_names(scores, tensor))} for {tensor}s" for tensor in TENSORS)
    print_plain(f"the KL divergence that storing this tensor alone adds, in the best of its formats ({numbers})", "dim")


def show_losses(scores: Scores) -> None:
    """Print the predicted loss of every layer's keys and values in every format, a few formats beside each other."""
    for tensor in TENSORS:
        names = _names(scores, tensor)
        for start in range(0, len(names), FORMATS_A_TABLE):
            chosen = names[start : start + FORMATS_A_TABLE]
            title = f"predicted loss of {_title(scores)}, {tensor}s: 10^-3 nats a token"
            table = Table(title, ("layer", *chosen))
            for entry in scores.layers:
                losses = entry.tensor(tensor).loss_increase
                if losses is not None:
                    table.add(str(entry.layer), *(_millinats(losses.get(name)) for name in chosen))
            table.print()


def _title(scores: Scores) -> str:
    name = scores.model.id if scores.model and scores.model.id else "a model"
    return f"{name} on {scores.calibration.dataset}" if scores.calibration else name


def _names(scores: Scores, tensor: TensorName) -> list[str]:
    """Return the names of all formats that any layer was scored in."""
    return list(dict.fromkeys(name for entry in scores.layers for name in entry.tensor(tensor).loss_increase or {}))


def _bits(name: str, tensor: TensorName) -> int | None:
    """Return the width of a format's codes; None for another runtime's."""
    try:
        return format_named(name, tensor, head_dim=2**10).bits
    except UsageError:
        return None


def _least(entry: AnyLayerScores, tensor: TensorName, names: Sequence[str]) -> float | None:
    losses: Mapping[str, float] = entry.tensor(tensor).loss_increase or {}
    return min((losses[name] for name in names if name in losses), default=None)


def _millinats(nats: float | None) -> str:
    if nats is None:
        return "-"
    number = nats * MILLINATS
    return f"{number:.0f}" if 99.95 <= number < 1e6 else f"{number:#.3g}"
