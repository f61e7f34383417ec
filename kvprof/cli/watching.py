"""Cost estimate before a long command, and the time and memory it took after."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from kvprof.api.job import Job
    from kvprof.models.memory import Peak
    from kvprof.records.estimate import Estimate


@contextlib.contextmanager
def watched(title: str, unit: str, device: str = "cpu", dry_run: bool = False, **place: Any) -> Iterator[Job]:
    """Yield a command's job, with a bar for its progress, its estimate before and what it took after.

    title, unit: of the bar. device: as the user named it. place: what else a Job has.
    """
    from kvprof.api.job import Job
    from kvprof.report.console import progress
    from kvprof.storage.folders import OUTPUTS

    watch = Watch(dry_run)
    with watch.over(device), progress(title, unit) as advance:
        yield Job(**place, progress=advance, beside=advance.beside, announce=watch, usual=OUTPUTS, dry_run=dry_run)


class Watch:
    """Prints the estimate that it is called with, and what the step took when its `with` ends without an error."""

    def __init__(self, dry_run: bool) -> None:
        self._dry_run = dry_run
        self._estimate: Estimate | None = None
        self._start = 0.0
        self._peak: Peak | None = None

    def __call__(self, estimate: Estimate) -> None:
        """Print the estimate of a step's cost; exit there on --dry-run."""
        from kvprof.report.console import print_result
        from kvprof.report.estimates import show_estimate

        show_estimate(estimate, is_result=self._dry_run)
        if self._dry_run:
            print_result(estimate)
            raise typer.Exit
        self._estimate = estimate
        # The estimate leaves out the loading of libraries, config and text, which is over by now.
        self._start = time.monotonic()
        if self._peak is not None:
            self._peak.restart()

    @contextlib.contextmanager
    def over(self, device: str) -> Iterator[None]:
        """Watch the memory and the clock. device: as the user named it."""
        from kvprof.models.load import usable_device
        from kvprof.models.memory import peak_memory, resident_bytes
        from kvprof.report.estimates import show_taken

        with peak_memory(usable_device(device), resident_bytes()) as self._peak:
            yield
        if self._estimate is not None:
            show_taken(self._peak.bytes, time.monotonic() - self._start, self._estimate)
