"""What callers give: a model in any form, a folder for the result or none, one word or several.

Turns it into what the rooms take. Does not know what is done with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprof.errors import UsageError
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores
from kvprof.storage.folders import output_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvprof.models.load import ModelSource

logger = logging.getLogger("kvprof")

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""

LARGEST_WINDOW = 2**31
LARGEST_SEED = 2**32 - 1


@contextlib.contextmanager
def borrowed(
    model: str | Path | PreTrainedModel | None, tokenizer: Any, trust_remote_code: bool = False
) -> Iterator[ModelSource]:
    """Yield the source that a model names or is; a loaded one is in eval mode meanwhile, and then as it was.

    trust_remote_code: as `resolve` takes it.
    Raises ModelError for a path that holds no model, UsageError for anything that cannot be one.
    """
    from transformers import PreTrainedModel

    from kvprof.models.load import lend, resolve
    from kvprof.models.loaded import as_found
    from kvprof.models.quiet import quiet

    if isinstance(model, PreTrainedModel):
        with quiet(), as_found(model):
            yield lend(model, tokenizer)
        return
    if model is not None and not isinstance(model, str | Path):
        raise UsageError(
            f"{_kind(model)} is no model that kvprof can read.\n"
            "  Give a hub id, a folder, a .gguf file, 'demo', or a loaded transformers model."
        )
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        raise UsageError(
            "a loaded tokenizer= goes with a loaded model.\n"
            "  For a model that is named, name the tokenizer too, or leave it out: the model has its own."
        )
    with quiet():
        yield resolve(
            None if model is None else str(model), trust_remote_code, None if tokenizer is None else str(tokenizer)
        )


@contextlib.contextmanager
def results_in(out: str | Path | None, model_id: str) -> Iterator[Path]:
    """Yield the folder for results: `out`, known to be writable; without one, one that is gone afterwards."""
    if out is not None:
        yield output_folder(model_id, Path(out))
        return
    with tempfile.TemporaryDirectory(prefix="kvprof-") as folder:
        yield Path(folder)


def several(given: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    """Return words that are given one or many at a time; raises UsageError for what is neither."""
    if isinstance(given, str | Path):
        return (str(given),)
    if not isinstance(given, Iterable):
        raise UsageError(f"{given!r} is no text, and no list of texts.")
    return tuple(str(word) for word in given)


def joined(given: str | Iterable[str | int] | None) -> str | None:
    """Return what an option takes as words between commas, given so or as a list; raises UsageError for neither."""
    return None if given is None else ",".join(several(given))  # type: ignore[arg-type]


def word(given: object) -> str:
    """Return what a dtype or a device is called, of torch's own too."""
    return str(given).removeprefix("torch.")


def scores_given(scores: Scores | str | Path) -> Scores:
    """Return Scores, read where a file is named. Raises InvalidFile as `Scores.load` does, UsageError for neither."""
    if isinstance(scores, Scores):
        return scores
    if not isinstance(scores, str | Path):
        raise UsageError(f"{_kind(scores)} is no Scores.\n  Give what kvprof.norms or gradients returns, or its file.")
    return Scores.load(scores)


def plan_given(plan: BitPlan | str | Path) -> BitPlan:
    """Return a plan, read where a file is named. Raises InvalidFile as `BitPlan.load` does, UsageError for neither."""
    if isinstance(plan, BitPlan):
        return plan
    if not isinstance(plan, str | Path):
        raise UsageError(f"{_kind(plan)} is no plan.\n  Give what kvprof.allocate returns, or its file.")
    return BitPlan.load(plan)


def check_range(name: str, number: float | None, low: float, high: float) -> None:
    """Raise UsageError for a number that the command would not take either."""
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if number is not None and not (is_number and low <= number <= high):
        raise UsageError(f"{name}={number!r}: a number from {low} to {high} is needed.")


def check_whole(**numbers: int | None) -> None:
    """Raise UsageError, naming the argument, for what is no whole number; which of them are too small is open."""
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise UsageError(f"{name}={number!r}: a whole number is needed.")


def check_counts(**numbers: int) -> None:
    """Raise UsageError, naming the argument, for what is no whole number, or none at all."""
    check_whole(**numbers)
    for name, number in numbers.items():
        if number is None:
            raise UsageError(f"{name}=None: a whole number is needed.")


def check_words(**words: object) -> None:
    """Raise UsageError, naming the argument, for what is neither text nor left out."""
    for name, given in words.items():
        if given is not None and not isinstance(given, str):
            raise UsageError(f"{name}={given!r}: a word is needed.")


def check_flags(**flags: object) -> None:
    """Raise UsageError, naming the argument, for what is neither True nor False."""
    for name, given in flags.items():
        if not isinstance(given, bool):
            raise UsageError(f"{name}={given!r}: True or False is needed.")


def check_around(out: object, progress: object = None) -> None:
    """Raise UsageError for a result's place that is none, and for progress that cannot be called."""
    if out is not None and not isinstance(out, str | os.PathLike):
        raise UsageError(f"out={out!r}: a path is needed.")
    if progress is not None and not callable(progress):
        raise UsageError(f"progress={progress!r}: a function of (done, in all) is needed.")


def check_window(sink_tokens: int | None, recent_tokens: int | None) -> None:
    """Raise UsageError for a window of fewer tokens than none, or of parts of one."""
    check_whole(sink_tokens=sink_tokens, recent_tokens=recent_tokens)
    check_range("sink_tokens", sink_tokens, 0, LARGEST_WINDOW)
    check_range("recent_tokens", recent_tokens, 0, LARGEST_WINDOW)


def remark(lines: Sequence[str]) -> None:
    """Log what a command would say beside its result."""
    for line in lines:
        logger.info(line)


def silent(done: int, total: int) -> None:
    """Show no progress."""


def _kind(given: object) -> str:
    module, name = type(given).__module__, type(given).__qualname__
    return f"a {name}" if module == "builtins" else f"a {module}.{name}"
