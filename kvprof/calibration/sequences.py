"""Rows of text -> sequences of token ids -> padded batches.

Knows the tokenizer and the lengths; does not know the model, and never measures padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from kvprof.calibration.chat import Chat, ChatWriter
from kvprof.calibration.remarks import reading_remark, row_remarks, sequence_remarks
from kvprof.calibration.text import TextSource
from kvprof.calibration.tokens import Beginning, beginning_of, special_tokens, token_ids, vocabulary_size
from kvprof.errors import CalibrationError, UsageError
from kvprof.records.scores import CalibrationInfo, TextShare

USUAL_LENGTH = 512
"""Tokens of a sequence, where nothing else is said."""

CALIBRATION_LENGTH = 1024
"""Likewise, where tensors are scored: on long texts, plans from 8 sequences of so many tokens are as good as those from
64 of half the length (tests/benchmarks/bench_text.py)."""

PIECE_CHARACTERS = 2**18
"""Of a row that are read at a time: a tokenizer takes a second for some megabytes."""

IGNORED = -100
"""The label of a position that has no target, by transformers' convention."""


@dataclass(frozen=True)
class Origin:
    """A text by its name, which of its splits was read, how much it weighs in a mix, and which column was text."""

    name: str
    split: str | None
    weight: float = 1.0
    column: str | None = None


@dataclass(frozen=True)
class CalibrationSet:
    """Sequences of token ids, each at least two tokens long, and where they came from.

    skipped: rows that were too short to have a target. notes: what befell the texts of a mix, in sentences. readings:
    what was read of each text, and what of its rows misleads. vocabulary: how many tokens the tokenizer has; None where
    that is not known.
    """

    sequences: tuple[tuple[int, ...], ...]
    info: CalibrationInfo
    skipped: int
    notes: tuple[str, ...] = ()
    readings: tuple[str, ...] = field(default=(), compare=False)
    vocabulary: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share, one field each, named so that a cause comes before its consequences."""
        fields = self.info.model_dump(mode="json")
        shares = fields.pop("sources", [])
        fields = {name: value for name, value in fields.items() if name not in ("source_of", "sequence_fingerprints")}
        if not fields.get("begins_with"):
            fields.pop("begins_with", None)  # nothing is added: the text is what it was before this was written down
        mix = {f"{name}s": [share.get(name) for share in shares] for name in ("weight", "split") if shares}
        if any(columns := [share.get("column") for share in shares]):
            mix["columns"] = columns
        column = {"column": fields.pop("column")} if "column" in fields else {}
        fields = {"dataset": fields.pop("dataset"), **column, **mix, **fields}
        words = {"fingerprint": "text fingerprint", "begins_with": "beginning of every sequence"}
        return {words.get(name, name): value for name, value in fields.items()}

    def first(self, count: int) -> CalibrationSet:
        """Return the first sequences alone."""
        return self.taken(range(min(count, len(self.sequences))))

    def taken(self, indices: Sequence[int]) -> CalibrationSet:
        """Return some of the sequences alone: as if no others had been asked for, but with the remarks on all."""
        if list(indices) == list(range(len(self.sequences))):
            return self
        taken, info = tuple(self.sequences[index] for index in indices), self.info
        origins = [Origin(share.dataset, share.split, share.weight, share.column) for share in info.sources or ()]
        every = info.source_of or (0,) * len(self.sequences)
        source_of = [every[index] for index in indices]
        described = describe(
            taken,
            source_of,
            origins or [Origin(info.dataset, info.split, column=info.column)],
            info.sequence_length,
            info.seed,
            info.begins_with,
        )
        return replace(self, sequences=taken, info=described)

    def remarks(self, asked: int) -> Iterator[str]:
        """Yield what a reader should know of a text that so many sequences were asked of."""
        if self.info.begins_with:
            yield f"every sequence begins with {' '.join(self.info.begins_with)}, as the tokenizer begins a text"
        if self.skipped:
            yield f"skipped {self.skipped} rows too short to have a target"
        yield from self.about_text()
        yield from self.notes
        if len(self.sequences) < asked:
            yield f"the text holds only {len(self.sequences)} of the {asked} sequences asked for"

    def about_text(self) -> Iterator[str]:
        """Yield what was read, and what of it misleads."""
        columns = [self.info.column, *(share.column for share in self.info.sources or ())]
        yield from self.readings
        yield from sequence_remarks(self.sequences, self.vocabulary, any(columns))


@dataclass(frozen=True)
class Batch:
    """Padded sequences. All tensors (B, T), int64.

    indices: which sequences of the set these are. labels: the input ids, unshifted, -100 at padding.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def choose_length(asked: int | None, positions: int | None, usual: int = USUAL_LENGTH) -> int:
    """Return the length to cut sequences to, for a model made for so many positions (None: no limit).

    asked: None is `usual`, or what the model was made for where that is less. Raises UsageError for more.
    """
    if asked is None:
        return min(usual, positions or usual)
    if asked > (positions or asked):
        raise UsageError(f"--sequence-length {asked}: the model was made for {positions}.\n  Try {positions}.")
    return asked


class SequenceReader:
    """The sequences that one source of text is cut into, one after the other.

    A row is one sequence, truncated on the right; a row too short to have a target is skipped and counted. With `pack`,
    and always for the built-in text, rows are joined and cut into windows of exactly `length` tokens.
    beginning: what each window begins with, where it does not by itself; what the tokenizer puts before a text, which a
    row has by itself.
    Raises CalibrationError where the text ends before its first sequence.
    """

    def __init__(
        self, source: TextSource, tokenizer: Any, length: int, pack: bool = False, beginning: Sequence[int] = ()
    ) -> None:
        self.source = source
        self.length = length
        self.skipped = 0
        self.found = 0
        self._packed = pack or source.packed
        self._tokenizer = tokenizer
        self._beginning = list(beginning)
        self._chats = ChatWriter(tokenizer)
        self._cut = self._windows() if self._packed else self._rows()

    def __iter__(self) -> SequenceReader:
        return self

    def __next__(self) -> tuple[int, ...]:
        for ids in self._cut:
            if len(ids) >= 2:
                self.found += 1
                return tuple(ids)
            self.skipped += 1
        if not self.found:
            raise CalibrationError(self._nothing_found())
        raise StopIteration

    def remarks(self) -> Iterator[str]:
        """Yield what was read of the text, and what of its rows misleads."""
        counts, chats = self.source.counts, self._chats
        if counts.lengths:
            yield reading_remark(self.source.name, counts, chats.has_template, chats.refused, chats.why, chats.left_out)
            yield from row_remarks(self.source.name, counts, self._packed, special_tokens(self._tokenizer))

    @property
    def origin(self) -> Origin:
        """The text, and which column of it was read."""
        return Origin(self.source.name, self.source.split, column=self.source.counts.column)

    def _texts(self) -> Iterator[tuple[str, bool]]:
        """Yield each row as text, and whether it has its marks of a beginning and an end by itself."""
        for row in self.source.rows:
            if isinstance(row, Chat):
                self.source.counts.chats += 1
                self.source.counts.beside.update(row.aside)
                self.source.counts.see(row.text)
                text = self._chats.write(row)
                if text is not None:
                    yield text, self._chats.has_template
            else:
                self.source.counts.see(row)
                yield row, False

    def _tokens(self, text: str, is_marked: bool) -> list[int]:
        """Return the tokens of the beginning of a row, which stands there once."""
        beginning = self._beginning
        ids = token_ids(self._tokenizer, text, marks=not is_marked)
        if is_marked and ids[: len(beginning)] != beginning:
            return beginning + ids
        if beginning and not is_marked and ids[: 2 * len(beginning)] == 2 * beginning:
            return ids[len(beginning) :]  # the row spells out what the tokenizer puts there too
        return ids

    def _rows(self) -> Iterator[list[int]]:
        counts = self.source.counts
        for row, is_marked in self._texts():
            read = PIECE_CHARACTERS
            ids = self._tokens(row[:read], is_marked)
            while read < len(row) and len(ids) < 2 * self.length:  # far enough from where the row was cut
                read *= 4
                ids = self._tokens(row[:read], is_marked)
            counts.lengths.append(len(ids))
            counts.cut |= read < len(row)
            yield ids[: self.length]

    def _windows(self) -> Iterator[list[int]]:
        """Join the rows and cut windows; a tokenizer's end mark, where it has one, stands between two rows.

        The beginning stands before the tokens of a window, unless they begin with it: many models lay their attention
        sink there, and are not themselves without it.
        """
        beginning = self._beginning
        buffer: list[int] = []
        for ids in self._joined():
            buffer += ids
            while True:
                added = [] if buffer[: len(beginning)] == beginning else beginning
                taken = self.length - len(added)
                if len(buffer) < max(taken, len(beginning)):  # too short for a window, or to know what it begins with
                    break
                yield added + buffer[:taken]
                del buffer[:taken]

    def _joined(self) -> Iterator[list[int]]:
        """Yield the tokens of one row after the other, in pieces."""
        counts, end = self.source.counts, self._tokenizer.eos_token_id
        last: list[int] = []
        for row, is_marked in self._texts():
            counts.lengths.append(0)
            for place, piece in enumerate(_pieces(row)):
                ids = self._tokens(piece, is_marked) if place == 0 else token_ids(self._tokenizer, piece, marks=False)
                if len(piece) < len(row) and ids[-1:] == [end] and not is_marked:
                    ids.pop()  # the row goes on
                last = ids[-1:] or last
                counts.lengths[-1] += len(ids)
                yield ids
            if end is not None and last != [end]:
                last = [end]
                yield last

    def _nothing_found(self) -> str:
        where = f"{self.source.name} ({self.source.split})"
        counts, chats = self.source.counts, self._chats
        if chats.refused and not counts.lengths:
            return (
                f"{where}: the tokenizer's chat template writes none of its chats: {chats.why}.\n"
                "  Name a column of plain text with --column, or a template of columns."
            )
        if self._packed and (counts.lengths or not counts.blank):
            return (
                f"{where} is shorter than one window of {self.length} tokens.\n  Lower --sequence-length, or add text."
            )
        if not self.skipped:
            column = "" if counts.column is None else f" in the column {counts.column!r}"
            return f"{where} holds no text{column}."
        return (
            f"{where} holds no sequence with a target: {self.skipped} rows were too short.\n"
            "  Give it rows of at least 2 tokens, or add --pack to join them."
        )


def tokenize(
    source: TextSource, tokenizer: Any, sequences: int, sequence_length: int, seed: int = 0, pack: bool = False
) -> CalibrationSet:
    """Cut calibration text into at most `sequences` sequences of at most `sequence_length` tokens.

    Raises CalibrationError where no sequence comes of it, UsageError for lengths without a target or no sequences at
    all.
    """
    check_request(sequences, sequence_length)
    beginning = beginning_of(tokenizer)
    check_room(sequence_length, beginning)
    reader = SequenceReader(source, tokenizer, sequence_length, pack, beginning.ids)
    found = list(islice(reader, sequences))
    info = describe(found, [0] * len(found), [reader.origin], sequence_length, seed, beginning.tokens)
    return CalibrationSet(tuple(found), info, reader.skipped, (), tuple(reader.remarks()), vocabulary_size(tokenizer))


def check_request(sequences: int, sequence_length: int) -> None:
    """Raise UsageError for no sequences at all, or too short ones."""
    if sequences < 1:
        raise UsageError(f"--sequences {sequences}: at least 1 is needed.")
    if sequence_length < 2:
        raise UsageError(f"--sequence-length {sequence_length}: at least 2 tokens are needed to have a target.")


def check_room(sequence_length: int, beginning: Beginning) -> None:
    """Raise UsageError where a sequence has no room for two tokens of text behind its beginning."""
    taken = len(beginning.ids)
    if taken and sequence_length <= taken + 1:
        raise UsageError(
            f"--sequence-length {sequence_length}: every sequence begins with {' '.join(beginning.tokens or ())}, as "
            f"the tokenizer begins a text, and {taken + 2} tokens are the fewest that leave two of the text."
        )


def check_largest(sequences: Iterable[Sequence[int]], size: int) -> None:
    """Raise CalibrationError where a model of so large a vocabulary does not know a token of these sequences."""
    largest = max((max(ids) for ids in sequences), default=0)
    if largest >= size:
        raise CalibrationError(f"the tokenizer writes token {largest}, but the model's vocabulary has {size}.")


def describe(
    sequences: Sequence[Sequence[int]],
    source_of: Sequence[int],
    origins: Sequence[Origin],
    sequence_length: int,
    seed: int,
    begins_with: tuple[str, ...] | None,
) -> CalibrationInfo:
    """Return what is written down of sequences: one text's name and split, or those of each text of a mix.

    source_of: for each sequence, the place of its text among `origins`; those that gave none are left out.
    begins_with: the tokens that each begins with; None where that is not known.
    """
    present = sorted(set(source_of))
    shares = [
        TextShare(
            dataset=origins[place].name,
            split=origins[place].split,
            weight=origins[place].weight,
            column=origins[place].column,
            sequences=sum(1 for source in source_of if source == place),
            tokens=sum(len(ids) for ids, source in zip(sequences, source_of, strict=True) if source == place),
        )
        for place in present
    ]
    splits = {share.split for share in shares}
    texts = [",".join(map(str, ids)) for ids in sequences]
    mixed = len(shares) > 1
    return CalibrationInfo(
        dataset="+".join(share.dataset for share in shares),
        split=splits.pop() if len(splits) == 1 else None,
        sequences=len(sequences),
        sequence_length=sequence_length,
        tokens=sum(map(len, sequences)),
        seed=seed,
        fingerprint="sha256:" + _sha256(";".join(texts)),
        sources=tuple(shares) if mixed else None,
        source_of=tuple(map(present.index, source_of)) if mixed else None,
        sequence_fingerprints=tuple(_sha256(text)[:16] for text in texts),
        begins_with=begins_with,
        column=None if mixed else origins[present[0]].column,
    )


def fingerprint_of(ids: Sequence[int]) -> str:
    """Return what `sequence_fingerprints` says of one sequence."""
    return _sha256(",".join(map(str, ids)))[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def batches(
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    indices: Sequence[int] | None = None,
    padding_side: Literal["left", "right"] = "right",
) -> Iterator[Batch]:
    """Pad sequences into batches, longest first, so that like lengths share a batch.

    indices: the sequences to use, all of them by default.
    """
    chosen = sorted(range(len(sequences)) if indices is None else indices, key=lambda i: (-len(sequences[i]), i))
    for start in range(0, len(chosen), batch_size):
        yield _pad(sequences, tuple(chosen[start : start + batch_size]), padding_side)


def _pad(sequences: Sequence[Sequence[int]], indices: tuple[int, ...], side: Literal["left", "right"]) -> Batch:
    longest = max(len(sequences[index]) for index in indices)
    input_ids = torch.zeros(len(indices), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, index in enumerate(indices):
        length = len(sequences[index])
        columns = slice(0, length) if side == "right" else slice(longest - length, longest)
        input_ids[row, columns] = torch.tensor(sequences[index])
        attention_mask[row, columns] = 1
    return Batch(indices, input_ids, attention_mask, input_ids.masked_fill(attention_mask == 0, IGNORED))


def _pieces(row: str) -> Iterator[str]:
    """Cut a row that is a book, where it has a space, so that no more of it is read than is used."""
    start = 0
    while len(row) - start > PIECE_CHARACTERS:
        stop = row.rfind(" ", start + 1, start + PIECE_CHARACTERS)
        stop = stop if stop > start else start + PIECE_CHARACTERS
        yield row[start:stop]
        start = stop
    yield row[start:]
