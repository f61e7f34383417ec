"""The terminal: errors, notes, prose, tables, progress. The only importer of rich.

Results go to stdout, all else to stderr. Under `--json` stdout is one record and nothing else; under `--quiet` nothing
but errors is printed. Does not know what it prints.
"""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.text import Text

from kvprof.storage.processes import launched_rank

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from kvprof.records.document import Record

_LEADS = launched_rank() == 0
"""Of several processes on one measurement, the first alone speaks, but for errors that it does not know of."""

out = Console(highlight=False, quiet=not _LEADS)
err = Console(stderr=True, highlight=False, quiet=not _LEADS)
Manner = Literal["plain", "json", "quiet", "within json"]
_manner: Manner = "plain"


@contextmanager
def speaking(as_json: bool = False, quiet: bool = False) -> Iterator[None]:
    """Choose how a command speaks. as_json: its result is printed as JSON. quiet: nothing but errors is printed.

    A command within another one that prints JSON prints no result of its own, and is quiet within a quiet one.
    """
    before = _manner
    asked: Manner = "json" if as_json else "quiet" if quiet else "plain"
    _set_manner(asked if before == "plain" else "quiet" if before == "quiet" else "within json")
    try:
        yield
    finally:
        _set_manner(before)


def _set_manner(manner: Manner) -> None:
    global _manner
    _manner = manner
    out.quiet = not _LEADS or manner != "plain"


def print_result(record: Record) -> None:
    """Print a command's result where it was asked for as JSON; else the tables beside this call say it."""
    if _manner == "json" and _LEADS:
        sys.stdout.write(record.to_text())


def print_json(text: str) -> None:
    """Print a result that is JSON anyway."""
    if _manner in ("plain", "json") and _LEADS:
        sys.stdout.write(text)


def clean(text: str) -> str:
    """Return text without the control codes that a file could smuggle into a terminal."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "\N{REPLACEMENT CHARACTER}" for mark in text)


def print_error(error: BaseException) -> None:
    """Print what went wrong, plainly."""
    if not _LEADS:
        own = Console(stderr=True, highlight=False)
        own.print(Text(f"error in process {launched_rank()}: {clean(str(error))}"), soft_wrap=True)
    err.print(Text.assemble(("error: ", "bold red"), clean(str(error))), soft_wrap=True)


def print_note(text: str) -> None:
    """Print a remark that is no result: to stderr, so that it never mixes with one."""
    if _manner != "quiet":
        err.print(Text(clean(text), style="yellow"), soft_wrap=True)


def print_written(path: Path) -> None:
    """Say where a result went."""
    (print_plain if _manner == "plain" else print_note)(f"written to {path}")


def print_finished(result: Record, path: Path, remarks: Iterable[str] = ()) -> None:
    """Print what a reader of a result should know, where it went, and under --json the result itself."""
    for remark in remarks:
        print_note(remark)
    print_written(path)
    print_result(result)


def print_fetched(fetched_bytes: int, whole_bytes: int) -> None:
    """Say how little of a checkpoint on the hub was fetched."""
    share = fetched_bytes / max(1, whole_bytes)
    print_plain(f"fetched {decimal_bytes(fetched_bytes)} of {decimal_bytes(whole_bytes)} ({100 * share:.1f} %)")


def decimal_bytes(count: int) -> str:
    """Return a number of bytes with three digits, in the units in which files are sold: 2.70 GB."""
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{amount:#.3g}".rstrip(".") + f" {unit}"


def print_plain(text: str, style: str = "") -> None:
    """Print a line of prose as it is: the terminal may wrap it, a pipe gets it whole."""
    out.print(Text(clean(text), style=style), soft_wrap=True)


def print_flag(name: str, text: str) -> None:
    """Print a red flag: a result, and a warning."""
    out.print(Text.assemble(("red flag ", "bold red"), (name, "bold"), f" {clean(text)}"), soft_wrap=True)


def print_side_by_side(left: Sequence[str], right: Sequence[str]) -> None:
    """Print two columns of paragraphs, row by row, the first of each as its heading; long lines wrap in their half."""
    from rich.table import Table as Grid

    grid = Grid(box=None, expand=True, padding=(0, 2, 0, 1))
    for heading in (left[0], right[0]):
        grid.add_column(Text(clean(heading), style="bold"), ratio=1, overflow="fold")
    for cells in zip(left[1:], right[1:], strict=True):
        grid.add_row(*(Text(clean(cell)) for cell in cells))
        grid.add_row("", "")
    out.print(grid)


COLUMNS = 80
"""What a table has to fit: every terminal has as many, and a pipe is read by people as well."""
LEAST_TEXT = 10
"""A column of text is never made narrower."""
BAR = " ▏▎▍▌▋▊▉█"
"""A cell filled by eighths."""


def bar(share: float, width: int) -> str:
    """Return a bar of so many cells, filled from the left by a share between 0 and 1."""
    eighths = round(8 * width * min(1.0, max(0.0, share)))
    return ("█" * (eighths // 8) + BAR[eighths % 8]).strip()


class Table:
    """Aligned columns under a title; where they are wider than the terminal, the widest text column breaks its lines.

    rich has a Table too, which takes longer to print thirty layers than the solver to plan them; `kvprof allocate`
    must answer at once.
    """

    def __init__(self, title: str, headings: Sequence[str], left: Sequence[int] = ()) -> None:
        """headings: may have two lines. left: the columns that are text, not numbers."""
        lines = max(heading.count("\n") for heading in headings) + 1
        split = [["", *heading.split("\n")][-lines:] for heading in headings]
        self._title = title
        self._head = [list(line) for line in zip(*split, strict=True)]
        self._left = frozenset(left)
        self._rows: list[tuple[list[str], str]] = []

    def add(self, *cells: str, style: str = "") -> None:
        """Add a row; cells that it lacks on the right are empty."""
        self._rows.append((list(cells), style))

    def print(self) -> None:
        """Print title, headings, a rule and the rows."""
        width = len(self._head[0])
        rows = [(cells + [""] * (width - len(cells)), style) for cells, style in self._rows]
        columns = zip(*self._head, *(cells for cells, _ in rows), strict=True)
        widths = self._fitted([max(map(len, column)) for column in columns])
        text = Text(clean(self._title) + "\n", style="bold")
        for cells in self._head:
            text.append(self._line(cells, widths) + "\n")
        text.append(" " + "─" * (sum(widths) + 2 * len(widths) - 1) + "\n", style="dim")
        for cells, style in rows:
            for line in self._broken(cells, widths):
                text.append(clean(self._line(line, widths)) + "\n", style=style or "not bold")
        out.print(text, soft_wrap=True)

    def _fitted(self, widths: list[int]) -> list[int]:
        """Take from the text columns, the widest first, what a row has too much."""
        room = max(COLUMNS, out.width if out.is_terminal else 0) - 2 * len(widths)
        least = {index: max(LEAST_TEXT, *(len(line[index]) for line in self._head)) for index in self._left}
        while sum(widths) > room and (wide := [index for index in self._left if widths[index] > least[index]]):
            widths[max(wide, key=lambda index: widths[index])] -= 1
        return widths

    def _broken(self, cells: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
        """Return the lines of a row: one, unless a text is wider than its column."""
        if all(len(cell) <= width for cell, width in zip(cells, widths, strict=True)):
            return [list(cells)]
        parts = [
            textwrap.wrap(cell, width) or [""] if index in self._left else [cell]
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return [list(line) for line in itertools.zip_longest(*parts, fillvalue="")]

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        aligned = (
            cell.ljust(width) if index in self._left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return (" " + "  ".join(aligned)).rstrip()


class Bar:
    """What a long step calls to show how far it is: with (done, total)."""

    def __init__(self, bar: Progress, what: str, unit: str) -> None:
        self._bar, self._what, self._unit = bar, what, unit
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that so much of the total is done."""
        if self._task is None:
            self._task = self._bar.add_task(self._what, total=None, unit=self._unit)
        self._bar.update(self._task, completed=done, total=total)

    def beside(self, what: str, unit: str) -> Bar:
        """Return a second bar, for a step that this one waits for; it is shown once it is called."""
        return Bar(self._bar, what, unit)


def throughput(a_second: float | None) -> str:
    """Return a speed as people say it: 3.2/s; below one a second, the time that each takes: 12.5 s each."""
    if not a_second:
        return ""
    return f"{a_second:.3g}/s" if a_second >= 1 else f"{1 / a_second:.3g} s each"


@contextmanager
def progress(what: str, unit: str) -> Iterator[Bar]:
    """Show a bar with the time left while the `with` lasts, where stderr is a terminal. unit: `bytes`, or a plural."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class Throughput(ProgressColumn):
        """How many a second, or where one takes longer, seconds for each."""

        def render(self, task: Task) -> Text:
            return Text(throughput(task.finished_speed or task.speed))

    counted: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TextColumn("{task.fields[unit]}"), Throughput())
    if unit == "bytes":
        counted = DownloadColumn(), TransferSpeedColumn()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *counted,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    hidden = _manner == "quiet" or not err.is_terminal
    where = Console(stderr=True, quiet=True) if hidden else err  # a bar that is not shown ends in a line of its own
    with Progress(*columns, console=where, disable=hidden) as bar:
        yield Bar(bar, what, unit)
