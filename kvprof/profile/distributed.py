"""The processes that share one measurement, as `accelerate launch` starts them; most often there is one.

Every process runs the same code. Each takes its turn of the work, and all learn all results. Does not know what the
work is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch

from kvprof.errors import KvprofError
from kvprof.storage.processes import launched_size

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""How long the others wait while one works: a block of a large model on a slow disk, a text that it writes."""


class ProcessGroup:
    """This process and its fellows.

    rank: of this process; 0 leads, and is the one that writes files and speaks.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    def turns(self, work: Sequence[T]) -> Iterator[T | None]:
        """Yield this process's piece of each round of the work; None where there are fewer pieces than processes."""
        for start in range(0, len(work), self.size):
            place = start + self.rank
            yield work[place] if place < len(work) else None

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do each process's own work, and return what all of them got, by rank.

        Raises, in every process, the KvprofError that the first of them raised.
        """
        result, error = None, None
        try:
            result = work()
        except KvprofError as failure:
            error = failure
        everyone: list[Any] = [(result, error)]
        if self.size > 1:
            everyone = [None] * self.size
            torch.distributed.all_gather_object(everyone, (result, error))
        for _, raised in everyone:
            if raised is not None:
                raised.is_shared = True
                raise raised
        return [result for result, _ in everyone]

    def each(self, work: Callable[[], T]) -> T:
        """Do something in every process, and return its own result; raises what any of them raised."""
        kept: list[T] = []
        self.together(lambda: kept.append(work()))
        return kept[0]

    def lead(self, work: Callable[[], T]) -> T | None:
        """Let the leading process do something; None in the others, which raise what it raised."""
        return self.each(lambda: work() if self.leads else None)

    def first(self, work: Callable[[], T]) -> T:
        """Let the leading process do something once, and return its result in every process."""
        return self.together(lambda: work() if self.leads else None)[0]  # type: ignore[return-value]


def join_process_group(device: str) -> tuple[ProcessGroup, str]:
    """Return the group that this process was launched into, and the device that is its own.

    device: as the user asked for it; of `auto`, each process of a machine takes a GPU of its own.
    """
    if launched_size() == 1:
        return ProcessGroup(), device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_PATIENCE)
    own = str(state.device) if device == "auto" else device
    return ProcessGroup(state.process_index, state.num_processes), own
