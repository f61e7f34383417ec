"""Which of several processes on one measurement this is: by the environment that accelerate, torchrun or mpirun set.

Reads environment variables alone, so that it costs nothing to ask.
"""

from __future__ import annotations

import os

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_size() -> int:
    """Return how many processes were launched together; 1 where nobody launched this one.

    Tasks that are told no address to meet at, as srun's are, each stand alone.
    """
    return max(1, _number(_SIZE, 1)) if "MASTER_ADDR" in os.environ else 1


def launched_rank() -> int:
    """Return the number of this process, from 0; the first alone writes and speaks."""
    return _number(_RANK, 0) if launched_size() > 1 else 0


def _number(names: tuple[str, ...], otherwise: int) -> int:
    for name in names:
        text = os.environ.get(name, "")
        if text.isdecimal():
            return int(text)
    return otherwise
