"""The error tree: what can go wrong, and the exit code that each kind of failure has.

Every error that a user, a file or a model can cause is a `KvprofError`. Its text says what went wrong, the value seen
and what to do next. This module knows nothing of where errors are printed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvprofError(Exception):
    """Something failed in a way that a message can explain. Exit code 1."""

    exit_code = 1
    is_shared = False
    """Whether every process of a measurement raises it, so that one message is enough."""


class UsageError(KvprofError):
    """The command line asks for something that does not exist or does not go together. Exit code 2."""

    exit_code = 2
    is_shared = True


class InfeasibleBudget(KvprofError):
    """No plan of these formats costs what the budget says. Exit code 3."""

    exit_code = 3


class Mismatch(KvprofError):
    """A file belongs to another model, or a resumed run to another setting. Exit code 4."""

    exit_code = 4


class Inexpressible(Mismatch):
    """A runtime cannot be told what a plan says. Exit code 4."""


class NotBetter(KvprofError):
    """A plan is no better than a baseline that stores no more bits. Exit code 5."""

    exit_code = 5


class InvalidFile(KvprofError):
    """A Scores, BitPlan, Evaluation or journal file that breaks its contract."""


class OutputError(KvprofError):
    """A result cannot be written where it was asked to go."""


class ModelError(KvprofError):
    """A model, its config, its tokenizer or its checkpoint cannot be used."""


class UnknownLayout(ModelError):
    """A checkpoint's K and V projections are not cut in a way that kvprof knows."""


class UnsupportedAttention(ModelError):
    """A model computes attention in a way that cannot be replaced by one that reads a quantized cache."""


class UnsupportedStreaming(ModelError):
    """A model's blocks cannot be loaded and run one at a time."""


class NonFiniteWeight(ModelError):
    """A weight holds NaN or infinity."""


class CacheError(KvprofError):
    """A cache is asked for what it cannot do as its plan promises; it is left as it was."""


class BeyondFormat(KvprofError):
    """Numbers are too large for a format of another runtime, which would store infinity."""


class OutOfMemory(KvprofError):
    """A device has no memory left for what it is asked to do."""


class NonFiniteGradient(KvprofError):
    """A gradient overflowed to NaN or infinity."""


class CalibrationError(KvprofError):
    """The calibration text cannot be read, or holds nothing to measure."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a clause that names the known word nearest to a misspelt one, else all of the known words."""
    names = list(known)
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"choose from {', '.join(names)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the ways in which Python, torch and the devices say that no memory is left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")  # of a CPU on Linux and Windows; of others
    return isinstance(error, RuntimeError) and any(said in str(error) for said in words)


def first_line(error: BaseException) -> str:
    """Return what an error says, on one line: of kvprof's own what went wrong, of a library's all of it.

    The first line of an error of kvprof's is whole by itself; a library's may say what matters in its last one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KvprofError) and lines:
        return lines[0]
    told = " ".join(lines)
    if " " in told:
        return told
    return f"{type(error).__name__}: {told}" if told else type(error).__name__  # a KeyError tells the key alone
