"""What was done before, and whether it still holds: a step is done again when anything that it depends on changed.

Reads files to hash them, and writes history.json. Runs nothing; does not know what a step means.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvprof import __version__
from kvprof.errors import InvalidFile
from kvprof.recipes.steps import Step
from kvprof.records.history import History, Stamp, StepTaken
from kvprof.storage.atomic import cannot_write
from kvprof.storage.lock import Lock

FILE = "history.json"

_PART = re.compile(r"-\d{5}-of-(?=\d{5}\.gguf$)")
"""In the name of a GGUF model's part: which it is."""

MODEL_FILES = (
    "*.safetensors",
    "*.gguf",
    "*.model",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "merges*",
    "*config.json",
    "*.py",
)
"""What of a model's folder can change what is measured."""


@dataclass(frozen=True)
class Verdict:
    """Whether a step is to be done, and why; if it is not, why not."""

    status: Literal["to do", "perhaps", "skipped"]
    reason: str


class Past:
    """What was done in a folder before, and what is done in it now.

    restart: hold nothing that was done for done. remark: what is wrong with the history that was found, if anything.
    As a context manager it keeps others from running a recipe in the folder meanwhile.
    """

    def __init__(self, folder: Path, restart: bool = False) -> None:
        self.folder = folder
        self.remark: str | None = None
        self._restart = restart
        self._path = folder / FILE
        self._model: str | None = None
        self._history = self._load()

    def __enter__(self) -> Past:
        self._lock = Lock(self._path.with_suffix(".lock"), f"runs a recipe in {self.folder}")
        try:
            self._lock.acquire()
        except OSError as error:
            raise cannot_write(self._path, error) from None
        self._history = self._load()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _load(self) -> History:
        self.remark = None
        if not self._path.exists():
            return History()
        try:
            found = History.load(self._path)
        except InvalidFile as error:
            self.remark = f"{error}\n  Every step is done again."
            return History()
        return found.model_copy(update={"steps": {}}) if self._restart else found

    @property
    def knows_nothing(self) -> bool:
        """Whether nothing was done before, so that no step can be skipped."""
        return not self._history.steps

    def read_model(self, model: str | Path) -> None:
        """Say which model this is now. model: a folder or file of weights; or what else stands for its content."""
        if isinstance(model, str):
            self._model = model
            return
        files = (
            sorted(model.parent.glob(_PART.sub("-[0-9][0-9][0-9][0-9][0-9]-of-", glob.escape(model.name))))
            if model.is_file()
            else sorted({file for name in MODEL_FILES for file in model.glob(name)})
        )
        stamps = {str(file): self._stamp(file) for file in files if file.is_file()}
        lines = "".join(f"{Path(file).name} {stamp.digest}\n" for file, stamp in stamps.items())
        self._model = _sha256(lines.encode())
        self._history = self._history.model_copy(update={"model_files": stamps})

    def verdicts(self, steps: Sequence[Step]) -> list[Verdict]:
        """Return of each step whether it is to be done, before any is; one that reads what another will write waits."""
        found: list[Verdict] = []
        unsure: dict[Path, int] = {}
        for number, step in enumerate(steps):
            verdict = self.verdict(step, steps[number + 1 :])
            waits = next((path for path in step.reads if path in unsure), None)
            if waits is not None and (verdict.status == "skipped" or waits.name in verdict.reason):
                verdict = Verdict("perhaps", f"only if step {unsure[waits]} writes another {waits.name}")
            if verdict.status != "skipped":
                unsure |= dict.fromkeys(step.writes, number + 1)
            found.append(verdict)
        return found

    def verdict(self, step: Step, later: Sequence[Step]) -> Verdict:
        """Return whether a step is to be done, all before it being done. later: the steps behind it."""
        taken = self._history.steps.get(self._key(step))
        if taken is None:
            return Verdict("to do", "not done yet")
        change = self._change(taken, self._begun(step, later))
        if change is not None:
            return Verdict("to do", change)
        if taken.writes is None:
            return Verdict("to do", "begun, and goes on where it was stopped")
        if not taken.writes:
            return Verdict("to do", "nothing that it wrote is known")
        for name, digest in taken.writes.items():
            now = self._digest(self.folder / name)
            if now is None:
                return Verdict("to do", f"{self.folder / name} is gone")
            if now not in self._successors(name, digest):
                return Verdict("to do", f"{self.folder / name} is no longer what it wrote")
        return Verdict("skipped", "its output is there, made from the same")

    def begin(self, step: Step, later: Sequence[Step]) -> bool:
        """Note that a step begins; return whether what a stopped run of it left behind is of no use now."""
        taken = self._history.steps.get(self._key(step))
        begun = self._begun(step, later)
        self._note(step, begun)
        return self._restart or (taken is not None and taken.writes is None and self._change(taken, begun) is not None)

    def end(self, step: Step) -> None:
        """Note that a step that began came to its end, and what it wrote."""
        begun = self._history.steps[self._key(step)]
        files = [file for path in step.writes for file in sorted(path.parent.glob(path.name))]
        writes = {self._name(file): self._digest(file) or "" for file in files}
        self._note(step, begun.model_copy(update={"writes": writes}))

    def written(self, step: Step) -> tuple[Path, ...]:
        """Return the files that a step wrote; that it will write, as far as that is known, where it is not done."""
        taken = self._history.steps.get(self._key(step))
        return step.writes if taken is None or taken.writes is None else tuple(map(self.folder.joinpath, taken.writes))

    def _note(self, step: Step, taken: StepTaken) -> None:
        self._history = self._history.model_copy(update={"steps": self._history.steps | {self._key(step): taken}})
        self._history.save(self._path)

    def _begun(self, step: Step, later: Sequence[Step]) -> StepTaken:
        """Return the record of a step that begins now."""
        return StepTaken(
            arguments=tuple(self._name(word) if isinstance(word, Path) else word for word in step.words),
            kvprof_version=__version__,
            model=self._model if step.of_model else None,
            reads={self._name(path): self._read(step, path, later) for path in step.reads},
            writes=None,
        )

    def _read(self, step: Step, path: Path, later: Sequence[Step]) -> str:
        """Return the digest of what a step reads: as it was before this step, or one behind it, wrote it anew."""
        now = self._digest(path)
        name = self._name(path)
        for other in (step, *later):
            taken = self._history.steps.get(self._key(other))
            adds = path in other.writes and path in other.reads  # as calibrate does to scores
            if adds and taken is not None and (taken.writes or {}).get(name) == now:
                return taken.reads.get(name, now or "none")
        return now or "none"

    def _successors(self, name: str, digest: str) -> set[str]:
        """Return the digests of a file as a step wrote it, and as steps that add to it made it since."""
        found = {digest}
        for taken in self._history.steps.values():
            if taken.writes is not None and name in taken.writes and taken.reads.get(name) == digest:
                found.add(taken.writes[name])
        return found

    def _change(self, taken: StepTaken, now: StepTaken) -> str | None:
        """Return what differs between what a step depended on and what it depends on now."""
        if taken.arguments != now.arguments:
            return f"it was another command: kvprof {' '.join(taken.arguments)}"
        for name in sorted({*taken.reads, *now.reads}):
            if taken.reads.get(name) != now.reads.get(name):
                return f"{self.folder / name if (self.folder / name).exists() else name} changed"
        if taken.model != now.model:
            return "the model changed"
        if taken.kvprof_version != now.kvprof_version:
            return f"it was done by kvprof {taken.kvprof_version}"
        return None

    def _key(self, step: Step) -> str:
        return f"{step.command} {self._name(step.writes[0])}"

    def _name(self, path: Path) -> str:
        """Return what a place is called in the history: from the folder on, so that the folder can be moved."""
        try:
            return path.relative_to(self.folder).as_posix()
        except ValueError:
            return Path(os.path.abspath(path)).as_posix()

    def _stamp(self, file: Path) -> Stamp:
        status = file.stat()
        known = self._history.model_files.get(str(file))
        if known is not None and (known.bytes, known.changed_ns) == (status.st_size, status.st_mtime_ns):
            return known
        return Stamp(bytes=status.st_size, changed_ns=status.st_mtime_ns, digest=self._digest(file) or "")

    @staticmethod
    def _digest(path: Path) -> str | None:
        """Return a file's digest; None where there is no file."""
        found = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    found.update(block)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        return f"sha256:{found.hexdigest()}"


def _sha256(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"
