"""The runtimes that plans can be made for, printed: what each can be told, in which formats, and what was checked.

Reads Runtimes; prints them through `console`. Does not know where they come from.
"""

from __future__ import annotations

from kvprof.records.replies import Runtimes
from kvprof.report.console import Table, print_plain


def show_targets(found: Runtimes) -> None:
    """Print a table of what each runtime can be told, then its formats and what was checked, runtime by runtime."""
    table = Table("runtimes that kvprof allocate --target plans for", ("target", "what it can be told"), left=[0, 1])
    for runtime in found.targets:
        table.add(runtime.name, runtime.grammar)
    table.print()
    for runtime in found.targets:
        print_plain("")
        print_plain(runtime.name, style="bold")
        if runtime.formats:
            bits = ", ".join(f"{form.name} {form.stored_bits}" for form in runtime.formats)
            print_plain(f"  stored bits: {bits}")
        print_plain(f"  writes: {runtime.writes}")
        print_plain(f"  needs: {runtime.needs}")
        print_plain(f"  checked: {runtime.checked_version}, on {runtime.checked_on}: {runtime.checked}")
