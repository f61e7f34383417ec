"""Where calibration text comes from: the built-in text, files, a hub dataset -> rows of text.

Reads text; does not know tokens. Two splits of one source never share a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvprof.calibration.chat import Row, text_of
from kvprof.calibration.columns import choose_reading, texts_beside
from kvprof.calibration.files import Fields, check_columns, in_turns, peeked, read_rows, shuffled
from kvprof.calibration.remarks import RowCounts
from kvprof.errors import CalibrationError, KvprofError, UsageError, did_you_mean, first_line
from kvprof.workspace.text_files import (
    HUB,
    KINDS,
    TextFiles,
    find_files,
    is_on_disk,
    is_pattern,
    kind_of,
    may_have_splits,
)

BUILTIN = "builtin"
SELF = "self"
"""Text that the model writes itself: it has no rows, see `calibration.self_generated`."""
SPLITS = ("calibration", "held-out")
ROWS_LOOKED_AT = 100
"""First rows that decide which column is text."""
_CONFIGURED = re.compile(r"---\s*\n(?:(?!---).*\n)*?configs:")
"""The beginning of a README.md that says which files are which configuration of a dataset."""
_README_CHARACTERS = 2**20
_HUB_SECONDS = 10.0
"""How long the hub may take to say that it knows a dataset."""


@dataclass(frozen=True)
class TextSource:
    """Rows of text with a name.

    rows: in the order to use them. packed: whether rows are pieces of one text, to be joined before they are cut.
    counts: what was read, filled in while rows are taken.
    """

    name: str
    split: str
    rows: Iterator[Row]
    packed: bool = False
    counts: RowCounts = field(default_factory=RowCounts)


def open_text(data: str = BUILTIN, split: str | None = None, seed: int = 0, column: str | None = None) -> TextSource:
    """Open a source of calibration text, its rows in an order that the seed decides.

    data: `builtin` (the Python language reference that ships inside the interpreter); a file, a folder or a pattern of
    files as `workspace.text_files.find_files` takes them (a line of a .txt is a row); or a hub dataset as `hub_parts`
    takes it: its id, with its configuration behind it where it has several.
    split: `calibration` or `held-out`, by a hash of the row (of the topic's name for the built-in text), three rows to
    one; `all` for both; of a hub dataset, or of files whose names tell splits apart, its own split. Default:
    calibration for the built-in text, all of a file, train of what has splits of its own.
    column: as `calibration.columns.choose_reading` takes it; left out of account where rows have no columns.
    Raises CalibrationError for text that cannot be read, UsageError for an unknown name.
    """
    if data == BUILTIN:
        return _builtin(split or "calibration", seed)
    if data == SELF:
        raise UsageError(f"{SELF} is text that the model writes; there is none to read here.\n  Try {BUILTIN}.")
    if not is_hub_dataset(data):
        return _on_disk(data, split, seed, column)
    if "/" not in data and (nearest := did_you_mean(data, [BUILTIN, SELF])).startswith("did"):
        raise UsageError(f"unknown --data {data!r}: {nearest}")
    return _hub(data, split or "train", seed, column)


def is_hub_dataset(data: str) -> bool:
    """Whether a source that `open_text` can open would be looked for on the hub."""
    return data not in (BUILTIN, SELF) and not is_on_disk(data) and _configured(data) is None


def has_own_splits(data: str) -> bool:
    """Whether a source may have splits by names of its own."""
    return data not in (BUILTIN, SELF) and (
        is_hub_dataset(data) or may_have_splits(data) or _configured(data) is not None
    )


def has_columns(data: str) -> bool:
    """Whether the rows of a source have columns, one of which can be chosen."""
    return data not in (BUILTIN, SELF) and (is_hub_dataset(data) or _found(data).kind != "lines")


def split_of(name: str) -> str:
    """Return the split that a row belongs to: the same in every process and on every machine."""
    return SPLITS[hashlib.sha256(name.encode()).digest()[0] % 4 == 0]


def in_split(rows: Iterator[Row], split: str | None) -> Iterator[Row]:
    """Yield the rows of a split of kvprof's own; all rows for `all` and for any other word."""
    return (row for row in rows if split not in SPLITS or split == split_of(text_of(row)))


def _builtin(split: str, seed: int) -> TextSource:
    check_split(split)
    from pydoc_data.topics import topics

    names = sorted(name for name in topics if split in ("all", split_of(name)))
    random.Random(seed).shuffle(names)
    return TextSource(BUILTIN, split, (topics[name] for name in names), packed=True)


def _on_disk(data: str, split: str | None, seed: int, column: str | None) -> TextSource:
    by_hash = split in (None, *SPLITS, "all")
    if not by_hash and not has_own_splits(data):
        check_split(str(split))
    path = Path(os.path.expanduser(data))
    with _explained(data):
        found = _found(data, None if by_hash else split)
        if all(file.stat().st_size == 0 for file in found.files):
            raise CalibrationError(f"{found.files[0]}: the file is empty.")
    counts = RowCounts(aside=found.aside)
    fields = shuffled(counts.held_in(read_rows(found.kind, found.files, seed)), seed)
    rows = _texts(fields, data, column, counts, has_columns=found.kind != "lines")
    name = str(path) if not is_pattern(data) else data
    own = found.split if by_hash and split is None else split
    return TextSource(name, own or "all", in_split(rows, split), counts=counts)


def _found(data: str, split: str | None = None) -> TextFiles:
    """Return the files that a name on the disk stands for, by the list of configurations where their folder has one."""
    configured = _configured(data)
    if configured is None:
        return find_files(data, split)
    import datasets

    folder, config = configured
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        files = datasets.load_dataset_builder(str(folder), name=config).config.data_files
    except ValueError as error:
        raise _of_configurations(str(folder), config, str(folder), error) from None
    chosen = split or ("train" if "train" in files else next(iter(files)))
    if chosen not in files:
        raise UsageError(f"--split {split}: {data} holds other splits: {did_you_mean(chosen, map(str, files))}")
    paths = tuple(map(Path, files[chosen]))
    kinds = {kind_of(path) for path in paths}
    if len(kinds) > 1 or None in kinds:
        raise CalibrationError(f"{data} holds files of several kinds, or of one that kvprof does not read.")
    others = tuple(f"the split {name}" for name in files if name != chosen)
    return TextFiles(str(kinds.pop()), paths, chosen, others)


def _configured(data: str) -> tuple[Path, str | None] | None:
    """Return the folder and the configuration that a name stands for, where its README.md lists configurations.

    The name is the folder's, or goes on behind it with a slash and the configuration.
    """
    path = Path(os.path.expanduser(data))
    for folder, config in ((path, None), (path.parent, path.name)):
        if config is not None and (os.path.exists(path) or folder == Path() or kind_of(data) is not None):
            continue
        with contextlib.suppress(OSError, ValueError), open(folder / "README.md", encoding="utf-8") as file:
            if _CONFIGURED.match(file.read(_README_CHARACTERS)):
                return folder, config
    return None


def _hub(name: str, split: str, seed: int, column: str | None) -> TextSource:
    from huggingface_hub import HfApi

    repository, part = hub_parts(name)
    with _explained(name):
        HfApi().dataset_info(repository, timeout=_HUB_SECONDS)  # asked first: datasets tries for half a minute
    counts = RowCounts()
    arguments: dict[str, Any] = {"split": split}
    if part is not None:
        arguments["data_files" if name.startswith(HUB) else "name"] = part
    return TextSource(name, split, _load(repository, arguments, name, seed, column, counts), counts=counts)


def hub_parts(name: str) -> tuple[str, str | None]:
    """Return the repository and what stands behind it, None where nothing does.

    That is a configuration (`org/name/config`; of a dataset that belongs to no organisation behind two slashes), or
    files of it (`hf://datasets/org/name/data/*.parquet`).
    """
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, config = rest.partition("/")
    return (f"{owner}/{repository}" if repository else owner), config or None


def may_be_configured(name: str) -> bool:
    """Whether a source may have several configurations, of which its name tells none."""
    if is_hub_dataset(name):
        return not name.startswith(HUB) and hub_parts(name)[1] is None
    configured = _configured(name)
    return configured is not None and configured[1] is None


def with_config(name: str, config: str) -> str:
    """Return the name of one configuration of a dataset, as `hub_parts` takes it apart."""
    return f"{name.rstrip('/')}{'/' if '/' in name else '//'}{config}"


def check_split(split: str) -> None:
    """Raise UsageError for what is no split of a text that kvprof splits itself."""
    if split not in (*SPLITS, "all"):
        raise UsageError(f"unknown --split {split!r}: {did_you_mean(split, [*SPLITS, 'all'])}")


def _load(
    repository: str,
    arguments: dict[str, Any],
    name: str,
    seed: int,
    column: str | None = None,
    counts: RowCounts | None = None,
) -> Iterator[Row]:
    """Stream the text of a dataset. arguments: of `datasets.load_dataset`. name: what messages call it."""
    return _texts(_streamed(repository, arguments, name, seed), name, column, counts or RowCounts())


def _streamed(repository: str, arguments: dict[str, Any], name: str, seed: int) -> Iterator[Fields]:
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said once, below
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every reading of a local file is told to a server
    try:
        stream = datasets.load_dataset(repository, streaming=True, **arguments)
    except ValueError as error:
        raise _of_configurations(repository, arguments.get("name"), name, error) from None
    # Shuffled here: of a stream that datasets shuffles it reads with threads, and waits five seconds for their end.
    parts = in_turns(range(stream.num_shards), lambda part: iter(stream.shard(stream.num_shards, part)), seed)
    yield from shuffled(parts, seed)


def _of_configurations(repository: str, config: str | None, name: str, error: ValueError) -> Exception:
    """Return what to raise for a dataset whose configuration is missing or unknown; any other error as it is."""
    if "config" not in str(error).lower():
        return error
    import datasets

    try:
        known = datasets.get_dataset_config_names(repository)
    except Exception:  # whatever it is, the first error says more
        return error
    if not known or config in known:
        return error
    missing = f"{name} has no configuration {config!r}" if config is not None else f"{name} has several configurations"
    return CalibrationError(
        f"{missing}: {', '.join(known)}.\n  Name one: --config {known[0]}, or --data {repository}/{known[0]}"
    )


def _texts(
    rows: Iterator[Fields], name: str, column: str | None, counts: RowCounts, has_columns: bool = True
) -> Iterator[Row]:
    """Yield what is text of rows, rows without text left out and counted."""
    with _explained(name):
        first, rows = peeked(rows, ROWS_LOOKED_AT)
        if not first:
            return
        check_columns(first[0])
        reading = choose_reading(first, column if has_columns else "text")
        if has_columns:
            counts.column = reading.name
            counts.aside = (*reading.aside, *counts.aside)
        for row in rows:
            text = reading.take(row)
            if text is None:
                counts.blank += 1
                if counts.blank <= ROWS_LOOKED_AT:
                    counts.blank_with.update(texts_beside(row, reading))
            else:
                yield text


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever files, datasets and the hub raise, the errors of a dozen libraries, into one message."""
    try:
        yield
    except KvprofError as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from None
    except Exception as error:
        raise CalibrationError(
            f"cannot read calibration text from {name}: {first_line(error)}\n"
            f"  Text is a file in UTF-8 of one of the kinds {', '.join(KINDS)}, a hub dataset, or `builtin`."
        ) from None
