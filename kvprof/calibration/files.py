"""Files of text -> rows, and rows in an order that a seed decides.

Reads files of one kind, compressed or not, a row at a time. Does not know which of a row's columns is text.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from kvprof.calibration.chat import is_messages
from kvprof.errors import CalibrationError

Fields = Mapping[str, Any]
"""A row: its columns by name."""

SHUFFLE_ROWS = 10_000
"""Rows of a text that are shuffled at a time."""
FILES_AT_ONCE = 10
"""Files of a text that take turns, so that the rows shuffled together are not of one file alone."""
MOST_COLUMNS = 1000
"""Of a table: what has more is no table of text, and would be listed by name in a message."""
BATCH_ROWS = 1000
"""Rows of a file of columns that are held as Python objects at a time."""
_BEGINNING_ROWS = 8
"""First rows of a column of bytes that decide whether it is text."""
_SAID_DELIMITER = re.compile(r"sep=(.)\r?\n?")
"""A first line that tells a spreadsheet what stands between columns."""

S = TypeVar("S")
T = TypeVar("T")


def read_rows(kind: str, files: Sequence[Path], seed: int) -> Iterator[Fields]:
    """Yield the rows of files of one kind; the seed decides the order of files, which take turns.

    FILES_AT_ONCE of them are open at a time. Raises CalibrationError for a row that breaks its file's format,
    and whatever else reading raises.
    """
    return in_turns(files, _READERS[kind], seed)


def shuffled(rows: Iterable[T], seed: int, buffer_rows: int = SHUFFLE_ROWS) -> Iterator[T]:
    """Yield rows in the order of `datasets.IterableDataset.shuffle`: rows in memory, half of which go when it is full.

    The same algorithm, so that a file that datasets read before keeps its order.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    buffer: list[T] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) == buffer_rows:
            order = generator.permutation(buffer_rows)
            gone = buffer_rows - buffer_rows // 2
            yield from (buffer[place] for place in order[:gone])
            buffer = [buffer[place] for place in order[gone:]]
    yield from (buffer[place] for place in generator.permutation(len(buffer)))


def in_turns(parts: Iterable[S], read: Callable[[S], Iterator[T]], seed: int) -> Iterator[T]:
    """Yield a row of each part in turn, the next part beginning where one ends; the seed decides their order.

    FILES_AT_ONCE parts are read at a time.
    """
    order = list(parts)
    random.Random(seed).shuffle(order)
    waiting = (read(part) for part in order)
    taking = list(islice(waiting, FILES_AT_ONCE))
    while taking:
        for reader in list(taking):
            try:
                yield next(reader)
            except StopIteration:
                place = taking.index(reader)
                taking[place : place + 1] = islice(waiting, 1)


def _lines(path: Path) -> Iterator[Fields]:
    with _characters(path) as file:
        for line in _without_nul(path, file):
            yield {"text": line.rstrip("\n")}


def _json(path: Path) -> Iterator[Fields]:
    """Read a row a line, or one list of rows: each an object, a text, or a list of messages."""
    with _characters(path) as file:
        numbered = ((number, line) for number, line in enumerate(_without_nul(path, file), 1) if not line.isspace())
        first = next(numbered, None)
        if first is None:
            return
        second = next(numbered, None)
        try:
            value = json.loads(first[1])
        except ValueError:
            value = None  # the beginning of a value of several lines, if of any
        if value is not None and (second is not None or isinstance(value, dict)):
            for number, line in chain([first], [second] if second else [], numbered):
                yield _row(_parsed(path, number, line), f"{path}, line {number}:")
            return
        rest = "".join(line for _, line in chain([second] if second else [], numbered))
    if value is None:
        try:
            value = json.loads(first[1] + rest)
        except ValueError as error:
            raise CalibrationError(
                f"{path} is no JSON, neither an object a line nor one list: {error}.\n  Check the file."
            ) from None
    several = isinstance(value, list) and not _is_one_chat(value)
    for number, row in enumerate(value if several else [value], 1):
        yield _row(row, f"{path}: entry {number} is")


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{path}, line {number}: no JSON: {error}.\n  Check the file.") from None


def _row(value: object, where: str) -> Fields:
    """Return the columns of a row of JSON: its own, or that of a bare text or chat."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if is_messages(value):
        return {"messages": value}
    raise CalibrationError(f"{where} {_kind(value)}, no object with columns.")


def _is_one_chat(value: Sequence[object]) -> bool:
    """Whether a list is the messages of one chat, and not rows that have each a role among other columns."""
    return is_messages(value) and all(isinstance(row, dict) and len(row) == 2 for row in value)


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _table(delimiter: str) -> Callable[[Path], Iterator[Fields]]:
    def read(path: Path) -> Iterator[Fields]:
        csv.field_size_limit(2**31 - 1)  # a book may be one cell
        with _characters(path, newline="") as file:
            lines = _without_nul(path, file)
            head = next(lines, "")
            said = _SAID_DELIMITER.fullmatch(head)
            between = said[1] if said else _delimiter_in(head, delimiter)
            rows = csv.reader(lines if said else chain([head], lines), delimiter=between, strict=True)
            try:
                names = _column_names(path, next(rows, ()))
                for cells in rows:
                    if not cells:
                        continue
                    if len(cells) > len(names):
                        raise csv.Error(f"{len(cells)} cells, where the first line names {len(names)} columns")
                    yield dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True))
            except csv.Error as error:
                place = rows.line_num + (said is not None)
                raise CalibrationError(f"{path}, line {place}: {error}.\n  Check the file.") from None

    return read


def _delimiter_in(head: str, usual: str) -> str:
    """Return what stands between the columns that a first line names: the usual, or what else makes several of it.

    Spreadsheets write a semicolon where a comma stands in numbers.
    """
    bare = re.sub(r'"[^"]*"', "", head)
    return next((delimiter for delimiter in (usual, ";", "\t", "|", ",") if delimiter in bare), usual)


def _column_names(path: Path, names: Sequence[str]) -> list[str]:
    check_columns(names)
    _check_different(path, [name for name in names if name])
    return [name or f"column {number}" for number, name in enumerate(names, 1)]


def _check_different(path: Path, names: Sequence[str]) -> None:
    """Raise CalibrationError for two columns of one name: a row would lose the one."""
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise CalibrationError(
            f"{path} has the column {twice[0]!r} {Counter(names)[twice[0]]} times.\n  Give each a name of its own."
        )


def _parquet(path: Path) -> Iterator[Fields]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:

        def batches(wanted: Sequence[str], number: int) -> Iterator[Any]:
            # Of all columns, none is named: a name with a dot in it would be taken for a path.
            columns = None if len(wanted) == len(file.schema_arrow.names) else wanted
            yield from file.iter_batches(batch_size=number, columns=columns)

        yield from _rows_of_columns(path, file.schema_arrow, batches)


def _arrow(path: Path) -> Iterator[Fields]:
    """Read a file of Arrow batches: the stream that `save_to_disk` writes, or the format with an index behind it."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:

        def batches(wanted: Sequence[str], number: int) -> Iterator[Any]:
            file.seek(0)
            try:
                whole = iter(pyarrow.ipc.open_stream(file))
            except pyarrow.ArrowInvalid:
                file.seek(0)
                indexed = pyarrow.ipc.open_file(file)
                whole = (indexed.get_batch(place) for place in range(indexed.num_record_batches))
            for batch in whole:
                chosen = batch.select(wanted)
                yield from (chosen.slice(start, number) for start in range(0, chosen.num_rows, number))

        try:
            schema = pyarrow.ipc.open_stream(file).schema
        except pyarrow.ArrowInvalid:
            file.seek(0)
            schema = pyarrow.ipc.open_file(file).schema
        yield from _rows_of_columns(path, schema, batches)


def _rows_of_columns(
    path: Path, schema: Any, batches: Callable[[Sequence[str], int], Iterator[Any]]
) -> Iterator[Fields]:
    """Yield the rows of a file of columns, of which those of bytes stand empty: pictures and sounds take long to read.

    A column of bytes that begins with text is text: old writers of Parquet annotate none.
    batches: some columns, by name, in batches of so many rows.
    """
    check_columns(schema.names)
    _check_different(path, schema.names)
    of_bytes = [field.name for field in schema if "binary" in str(field.type)]
    plain = [field.name for field in schema if str(field.type) in ("binary", "large_binary", "binary_view")]
    written = [name for name in plain if _begins_with_text(next(batches([name], _BEGINNING_ROWS), None))]
    left = {name: b"" for name in of_bytes if name not in written}
    for batch in batches([name for name in schema.names if name not in left], BATCH_ROWS):
        for row in batch.to_pylist():
            for name in written:
                row[name] = _as_text(path, name, row[name])
            yield row | left if left else row


def _begins_with_text(batch: Any) -> bool:
    """Whether the bytes of the one column of a batch are text in UTF-8."""
    values = [value for value in batch.column(0).to_pylist() if value] if batch is not None else []
    try:
        return bool(values) and not any("\0" in value.decode() for value in values)
    except UnicodeDecodeError:
        return False


def _as_text(path: Path, name: str, value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: the column {name!r} holds bytes that are no text: {error}.") from None


def check_columns(names: Sequence[str] | Fields) -> None:
    """Raise CalibrationError for more columns than a table of text has."""
    if len(names) > MOST_COLUMNS:
        raise CalibrationError(
            f"its rows have {len(names)} columns; a table of text has {MOST_COLUMNS} at most.\n"
            "  Write the text alone: a .txt file, or one column 'text'."
        )


def _characters(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Open a file of UTF-8, through its compression."""
    return io.TextIOWrapper(_bytes(path), encoding="utf-8-sig", newline=newline)


def _without_nul(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """Yield lines; raise CalibrationError for NUL, which UTF-16 read as UTF-8 is full of, and text has none of."""
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise CalibrationError(
                f"{path}, line {number}: holds NUL characters: it is UTF-16 without its mark, or no text.\n"
                f"  Write it in UTF-8, as in: iconv -f UTF-16LE -t UTF-8 {path.name}"
            )
        yield line


def _bytes(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":  # not in Python's own library before 3.14
        import pyarrow

        return cast("IO[bytes]", pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    if suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    if suffix == ".bz2":
        return bz2.open(path)
    return lzma.open(path) if suffix == ".xz" else open(path, "rb")


_READERS: dict[str, Callable[[Path], Iterator[Fields]]] = {
    "lines": _lines,
    "json": _json,
    "csv": _table(","),
    "tsv": _table("\t"),
    "parquet": _parquet,
    "arrow": _arrow,
}


def peeked(rows: Iterator[T], number: int) -> tuple[list[T], Iterator[T]]:
    """Return the first rows, and all rows from the first on."""
    first = list(islice(rows, number))
    return first, chain(first, rows)
