"""The runtimes that plans can be made for, printed: what each can be told, in which formats, and what was checked.

Reads rows that its caller made; prints them through `console`. Does not know where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvprof.report.console import Table, print_plain


@dataclass(frozen=True)
class TargetRow:
    """A runtime in words. formats: each with its stored bits, dearest first."""

    name: str
    words: str
    formats: Sequence[tuple[str, str]]
    artefact: str
    since: str
    checked: str


def show_targets(rows: Sequence[TargetRow]) -> None:
    """Print a table of what each runtime can be told, then its formats and what was checked, runtime by runtime."""
    table = Table("runtimes that kvprof allocate --target plans for", ("target", "what it can be told"), left=[0, 1])
    for row in rows:
        table.add(row.name, row.words)
    table.print()
    for row in rows:
        print_plain("")
        print_plain(row.name, style="bold")
        if row.formats:
            print_plain("  stored bits: " + ", ".join(f"{name} {bits}" for name, bits in row.formats))
        print_plain(f"  writes: {row.artefact}")
        print_plain(f"  needs: {row.since}")
        print_plain(f"  checked: {row.checked}")
