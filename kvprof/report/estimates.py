"""What a long step will take, before it starts; and what it took, beside that."""

from __future__ import annotations

from kvprof.records.estimate import Estimate
from kvprof.records.geometry import bytes_text
from kvprof.records.words import counted
from kvprof.report.console import print_note, print_plain


def show_estimate(estimate: Estimate, is_result: bool) -> None:
    """Say what a step will take: on stdout where that is all that was asked, else as a note."""
    parts = []
    if estimate.sequences is not None and estimate.tokens is not None:
        parts.append(f"{counted(estimate.sequences, 'sequence')}, {counted(estimate.tokens, 'token')}")
    if estimate.read_bytes is not None:
        parts.append(f"{bytes_text(estimate.read_bytes)} of weights to read")
    if estimate.seconds is not None:
        parts.append(f"about {duration(estimate.seconds)}")
    if estimate.writing_seconds is not None:
        parts.append(f"{duration(estimate.writing_seconds)} more where the text that the model writes is not kept yet")
    parts.append(f"{bytes_text(estimate.memory_bytes)} of memory ({bytes_text(estimate.free_bytes)} free)")
    parts.append(f"{bytes_text(estimate.disk_bytes)} on disk")
    (print_plain if is_result else print_note)("estimate: " + "; ".join(parts))
    if is_result:  # else it is said beside the results
        for remark in estimate.text:
            print_note(remark)
    if not estimate.fits:
        print_note(
            "That is more memory than is free: --stream holds one block at a time; a smaller --dtype, --batch-size or "
            "--sequence-length needs less."
        )


def show_taken(peak_bytes: int | None, seconds: float, estimate: Estimate) -> None:
    """Say what a step took, beside its estimate."""
    memory = "" if peak_bytes is None else f" and {bytes_text(peak_bytes)} of memory"
    expected = "" if estimate.seconds is None else f"{duration(estimate.seconds)} and "
    if estimate.writing_seconds is not None:
        expected = f"{expected.removesuffix(' and ')}, {duration(estimate.writing_seconds)} for writing text, and "
    print_note(f"took {duration(seconds)}{memory}; estimated were {expected}{bytes_text(estimate.memory_bytes)}")


def duration(seconds: float) -> str:
    """Return a time as people say it: 8 s, 2 min 10 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{max(1, whole)} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
