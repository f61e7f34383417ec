"""Where calibration text comes from: the built-in text, a file, a hub dataset -> rows of text.

Reads text; does not know tokens. Two splits of one source never share a row.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprof.errors import CalibrationError, UsageError, did_you_mean, first_line

BUILTIN = "builtin"
SELF = "self"
"""Text that the model writes itself: it has no rows, see `calibration.self_text`."""
SPLITS = ("calibration", "held-out")
LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TEXT_COLUMNS = ("text", "content", "prompt", "document")
SHUFFLE_ROWS = 10_000
"""Rows of a file or dataset that are shuffled at a time."""
MOST_COLUMNS = 1000
"""Of a .csv or .jsonl file: datasets takes minutes for a hundred thousand."""
_FIRST_LINE_BYTES = 2**20
_HUB_SECONDS = 10.0
"""How long the hub may take to say that it knows a dataset."""


@dataclass(frozen=True)
class TextSource:
    """Rows of text with a name.

    rows: in the order to use them. packed: whether rows are pieces of one text, to be joined before they are cut.
    """

    name: str
    split: str
    rows: Iterator[str]
    packed: bool = False


def open_text(data: str = BUILTIN, split: str | None = None, seed: int = 0) -> TextSource:
    """Open a source of calibration text, its rows in an order that the seed decides.

    data: `builtin` (the Python language reference that ships inside the interpreter), a .txt (a line is a row), .jsonl,
    .parquet or .csv file, or the id of a hub dataset.
    split: `calibration` or `held-out`, by a hash of the row (of the topic's name for the built-in text), three rows to
    one; `all` for both; for a hub dataset, its own split. Default: calibration for the built-in text, all of a file,
    train of a dataset.
    Raises CalibrationError for text that cannot be read, UsageError for an unknown name.
    """
    if data == BUILTIN:
        return _builtin(split or "calibration", seed)
    if data == SELF:
        raise UsageError(f"{SELF} is text that the model writes; there is none to read here.\n  Try {BUILTIN}.")
    path = Path(os.path.expanduser(data))
    if path.suffix.lower() in LOADERS:
        return _file(path, split or "all", seed)
    if os.path.exists(path):  # unlike Path.exists, no name is too long for it
        raise UsageError(f"{data} is no text that kvprof reads: name a file that ends in {', '.join(LOADERS)}.")
    if "/" not in data and (nearest := did_you_mean(data, [BUILTIN, SELF])).startswith("did"):
        raise UsageError(f"unknown --data {data!r}: {nearest}")
    return _hub(data, split or "train", seed)


def is_hub_dataset(data: str) -> bool:
    """Whether a source that `open_text` can open would be looked for on the hub."""
    return data not in (BUILTIN, SELF) and Path(data).suffix.lower() not in LOADERS


def split_of(name: str) -> str:
    """Return the split that a row belongs to: the same in every process and on every machine."""
    return SPLITS[hashlib.sha256(name.encode()).digest()[0] % 4 == 0]


def _builtin(split: str, seed: int) -> TextSource:
    check_split(split)
    from pydoc_data.topics import topics

    names = sorted(name for name in topics if split in ("all", split_of(name)))
    random.Random(seed).shuffle(names)
    return TextSource(BUILTIN, split, (topics[name] for name in names), packed=True)


def _file(path: Path, split: str, seed: int) -> TextSource:
    check_split(split)
    if not os.path.isfile(path):
        raise CalibrationError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{path}: the file is empty.")
    _check_columns(path)
    files = {"data_files": glob.escape(str(path.resolve())), "split": "train"}
    rows = _load(LOADERS[path.suffix.lower()], files, str(path), seed)
    return TextSource(str(path), split, (row for row in rows if split in ("all", split_of(row))))


def _check_columns(path: Path) -> None:
    """Raise CalibrationError for a first line of more columns than a table of text has."""
    kind = LOADERS[path.suffix.lower()]
    if kind not in ("csv", "json"):
        return
    try:
        with open(path, "rb") as file:
            line = file.readline(_FIRST_LINE_BYTES)
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}.") from None
    if kind == "csv":
        columns = line.count(b",") + 1
    else:  # a list is of many rows
        columns = len(re.findall(rb'(?<!\\)"\s*:', line)) if line.lstrip().startswith(b"{") else 0
    if columns > MOST_COLUMNS:
        raise CalibrationError(
            f"{path}: its first line names {columns} columns or more; a table of text has {MOST_COLUMNS} at most.\n"
            f"  Write the text alone: a .txt file, or one column {TEXT_COLUMNS[0]!r}."
        )


def _hub(name: str, split: str, seed: int) -> TextSource:
    from huggingface_hub import HfApi

    with _explained(name):
        HfApi().dataset_info(name, timeout=_HUB_SECONDS)  # asked first, because datasets tries for half a minute
    return TextSource(name, split, _load(name, {"split": split}, name, seed))


def check_split(split: str) -> None:
    """Raise UsageError for what is no split of a text that kvprof splits itself."""
    if split not in (*SPLITS, "all"):
        raise UsageError(f"unknown --split {split!r}: {did_you_mean(split, [*SPLITS, 'all'])}")


def _load(builder: str, arguments: dict[str, Any], name: str, seed: int) -> Iterator[str]:
    """Stream the text column of a dataset, empty rows left out."""
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said once, below
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every reading of a local file is told to a server
    with _explained(name):
        stream = datasets.load_dataset(builder, streaming=True, **arguments)
        column = None
        for row in stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS):
            column = column or _text_column(row, name)
            text = row[column]
            if text is not None and not isinstance(text, str):
                raise CalibrationError(f"{name}: the column {column!r} holds {type(text).__name__}, not text.")
            if text and text.strip():
                yield text


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever datasets and the hub raise, the errors of a dozen libraries, into one message."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"cannot read calibration text from {name}: {first_line(error)}\n"
            f"  Text is a file in UTF-8 of one of the kinds {', '.join(LOADERS)}, a hub dataset, or `builtin`."
        ) from None


def _text_column(row: dict[str, Any], name: str) -> str:
    """Return the column to read, by the first row: the usual name for one, else the only column of text."""
    columns = [column for column, value in row.items() if value is None or isinstance(value, str)]
    for usual in TEXT_COLUMNS:
        if usual in row:
            return usual
    if len(columns) == 1:
        return columns[0]
    raise CalibrationError(
        f"{name}: cannot tell which column is text; found {', '.join(row) or 'no columns'}.\n"
        f"  Name one column {TEXT_COLUMNS[0]!r}."
    )
