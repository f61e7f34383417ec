"""Jobs: which model a measurement reads, where its result goes, and whom it tells of its progress.

A command and a function of the same name run the same job: the command's result always goes to a folder, the
function's only where one is named.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from kvprof.errors import UsageError
from kvprof.storage.folders import output_folder, slug

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvprof.models.source import ModelSource
    from kvprof.records.estimate import Estimate

logger = logging.getLogger("kvprof")

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


def silent(done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Job:
    """Where a measurement reads and writes.

    model: a hub id, a folder, a .gguf file, `demo`, or a loaded model; None for the demo model. tokenizer: a loaded
    one, or its name. trust_remote_code: let the model's own Python code run. out: a folder for results. restart: begin
    anew there. progress: called with (done, in all). beside: makes what is called likewise of a step that comes first,
    of its title and its unit. announce: called with the estimate of a run before a weight is loaded; may raise, to
    stop. usual: the folder that has each model's results where none is named; None writes nothing then. dry_run:
    measure nothing, not even what the run needs first; `announce` stops it.
    """

    model: str | Path | PreTrainedModel | None = None
    tokenizer: Any = None
    trust_remote_code: bool = False
    out: str | Path | None = None
    restart: bool = False
    progress: Progress = silent
    beside: Callable[[str, str], Progress] = lambda title, unit: silent
    announce: Callable[[Estimate], None] = lambda estimate: None
    usual: Path | None = None
    dry_run: bool = False

    @property
    def writing(self) -> Progress:
        """Called with (tokens done, in all) of text that the model writes itself first."""
        return self.beside("writing text", "tokens")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return the job among a function's keywords. Raises UsageError, naming the one that is of a wrong type."""
        for name in ("trust_remote_code", "restart"):
            if not isinstance(given[name], bool):
                raise UsageError(f"{name}={given[name]!r}: True or False is needed.")
        check_out(given["out"])
        if given["progress"] is not None and not callable(given["progress"]):
            raise UsageError(f"progress={given['progress']!r}: a function of (done, in all) is needed.")
        names = ("model", "tokenizer", "trust_remote_code", "out", "restart")
        return cls(**{name: given[name] for name in names}, progress=given["progress"] or silent)

    def of_model(self, usual: str | None) -> Self:
        """Return the job with a model where none is named."""
        return self if self.model is not None else replace(self, model=usual)

    def source(self) -> contextlib.AbstractContextManager[ModelSource]:
        """Return a context of the model's source; a loaded model is in eval mode meanwhile, and then as it was.

        Raises ModelError for a path that holds no model, UsageError for anything that cannot be one.
        """
        return _source(self.model, self.tokenizer, self.trust_remote_code)

    @contextlib.contextmanager
    def folder(self, model_id: str, inside: str = "") -> Iterator[Path]:
        """Yield the folder for results; one that is not named and not usual is gone afterwards. Raises OutputError.

        inside: a folder within the usual one.
        """
        if self.out is None and self.usual is None:
            with tempfile.TemporaryDirectory(prefix="kvprof-") as folder:
                yield Path(folder)
            return
        usual = None if self.usual is None else self.usual / slug(model_id) / inside
        yield output_folder(model_id, usual if self.out is None else Path(self.out))

    @contextlib.contextmanager
    def opened(self, inside: str = "") -> Iterator[tuple[ModelSource, Path]]:
        """Yield the model's source and the folder for results, as above."""
        with self.source() as source, self.folder(source.id, inside) as folder:
            yield source, folder


@contextlib.contextmanager
def _source(
    model: str | Path | PreTrainedModel | None, tokenizer: Any, trust_remote_code: bool
) -> Iterator[ModelSource]:
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
            f"{kind_of(model)} is no model that kvprof can read.\n"
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


def check_out(out: object) -> None:
    """Raise UsageError for a result's place that is none."""
    if out is not None and not isinstance(out, str | os.PathLike):
        raise UsageError(f"out={out!r}: a path is needed.")


def remark(lines: Iterable[str]) -> None:
    """Log what a command would print beside its result."""
    for line in lines:
        logger.info(line)


def kind_of(given: object) -> str:
    """Return what an object is, for a message."""
    module, name = type(given).__module__, type(given).__qualname__
    return f"a {name}" if module == "builtins" else f"a {module}.{name}"
