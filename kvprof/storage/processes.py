"""Which process this is: of several on one measurement, and on which machine; and whether another is still there.

The first by the environment that accelerate, torchrun or mpirun set. It costs nothing to ask.
"""

from __future__ import annotations

import os
import socket

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


def host_name() -> str:
    """Return what this machine, or this container, calls itself."""
    return socket.gethostname()


def is_gone(host: str, pid: int) -> bool:
    """Whether a process has surely ended. Of another machine's, or on Windows, that cannot be known."""
    if host != host_name() or os.name != "posix" or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def _number(names: tuple[str, ...], otherwise: int) -> int:
    for name in names:
        text = os.environ.get(name, "")
        if text.isdecimal():
            return int(text)
    return otherwise
