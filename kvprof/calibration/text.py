"""Where calibration text comes from: the built-in text, a file, a hub dataset -> rows of text.

Reads text; does not know tokens. Two splits of one source never share a row.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprof.errors import CalibrationError, UsageError, did_you_mean

BUILTIN = "builtin"
SPLITS = ("calibration", "held-out")
LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TEXT_COLUMNS = ("text", "content", "prompt", "document")
SHUFFLE_ROWS = 10_000
"""Rows of a file or dataset that are shuffled at a time."""


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
    path = Path(data).expanduser()
    if path.suffix.lower() in LOADERS:
        return _file(path, split or "all", seed)
    if path.exists():
        raise UsageError(f"{data} is no text that kvprof reads: name a file that ends in {', '.join(LOADERS)}.")
    if "/" not in data and did_you_mean(data, [BUILTIN]).startswith("did"):
        raise UsageError(f"unknown --data {data!r}: {did_you_mean(data, [BUILTIN])}")
    return _hub(data, split or "train", seed)


def split_of(name: str) -> str:
    """Return the split that a row belongs to: the same in every process and on every machine."""
    return SPLITS[hashlib.sha256(name.encode()).digest()[0] % 4 == 0]


def _builtin(split: str, seed: int) -> TextSource:
    _check_split(split)
    from pydoc_data.topics import topics

    names = sorted(name for name in topics if split in ("all", split_of(name)))
    random.Random(seed).shuffle(names)
    return TextSource(BUILTIN, split, (topics[name] for name in names), packed=True)


def _file(path: Path, split: str, seed: int) -> TextSource:
    _check_split(split)
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file.")
    rows = _load(LOADERS[path.suffix.lower()], {"data_files": str(path.resolve()), "split": "train"}, str(path), seed)
    return TextSource(str(path), split, (row for row in rows if split in ("all", split_of(row))))


def _hub(name: str, split: str, seed: int) -> TextSource:
    return TextSource(name, split, _load(name, {"split": split}, name, seed))


def _check_split(split: str) -> None:
    if split not in (*SPLITS, "all"):
        raise UsageError(f"unknown --split {split!r}: {did_you_mean(split, [*SPLITS, 'all'])}")


def _load(builder: str, arguments: dict[str, Any], name: str, seed: int) -> Iterator[str]:
    """Stream the text column of a dataset, empty rows left out."""
    import datasets

    try:
        stream = datasets.load_dataset(builder, streaming=True, **arguments)
        rows = iter(stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS))
        while (row := next(rows, None)) is not None:
            text = row[_text_column(row, name)]
            if text.strip():
                yield text
    except (CalibrationError, UsageError):
        raise
    except Exception as error:  # datasets raises the errors of a dozen parsers, many of them bare Exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise CalibrationError(
            f"cannot read calibration text from {name}: {reason}\n"
            f"  Name a file that ends in {', '.join(LOADERS)}, or `builtin`, which needs no network."
        ) from None


def _text_column(row: dict[str, Any], name: str) -> str:
    """Return the column to read: the usual name for one, else the only column of text."""
    columns = [column for column, value in row.items() if isinstance(value, str)]
    for usual in TEXT_COLUMNS:
        if usual in columns:
            return usual
    if len(columns) == 1:
        return columns[0]
    raise CalibrationError(
        f"{name}: cannot tell which column is text; found {', '.join(row) or 'no columns'}.\n"
        f"  Name one column {TEXT_COLUMNS[0]!r}."
    )
