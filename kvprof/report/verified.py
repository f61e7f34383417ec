"""A verified plan, printed: a line for each check.

Reads a Verified record, prints it through `console`.
"""

from __future__ import annotations

from kvprof.records.replies import Check, Verified
from kvprof.records.words import short_digest
from kvprof.report.console import print_plain

STYLES = {"holds": "", "differs": "bold red", "unknown": "yellow"}


def show_verified(verified: Verified) -> None:
    """Print each check in a line, and how many there are of each kind."""
    for check in verified.checks:
        print_plain(check_line(check), style=STYLES[check.status])
    if verified.scores is not None:
        print_plain(f"held against {verified.scores}" + (f" and {verified.model}" if verified.model else ""))
    counts = {status: sum(check.status == status for check in verified.checks) for status in STYLES}
    print_plain(
        f"{counts['holds']} checks hold, {counts['differs']} differ, {counts['unknown']} cannot be checked",
        style="bold",
    )


def check_line(check: Check) -> str:
    """Return what a check found; both values where they differ."""
    note = f" ({check.note})" if check.note else ""
    if check.status == "unknown":
        return f"{check.name}: cannot be checked: {check.note}"
    if check.status == "holds":
        return f"{check.name}: holds: {_brief(check.found)}{note}"
    return f"{check.name}: DIFFERS: the file says {_brief(check.said)}, found {_brief(check.found)}{note}"


def _brief(text: str | None) -> str:
    """Return a value, a digest by its first digits."""
    words = str(text)
    return short_digest(words) if words.startswith("sha256:") and len(words) > 22 else words
