"""Rows of text -> sequences of token ids -> padded batches.

Knows the tokenizer and the lengths; does not know the model, and never measures padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from kvprof.calibration.text import TextSource
from kvprof.calibration.tokens import Beginning, beginning_of, token_ids
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
    """A text by its name, which of its splits was read, and how much it weighs in a mix."""

    name: str
    split: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class CalibrationSet:
    """Sequences of token ids, each at least two tokens long, and where they came from.

    skipped: rows that were too short to have a target. notes: what befell the texts of a mix, in sentences.
    """

    sequences: tuple[tuple[int, ...], ...]
    info: CalibrationInfo
    skipped: int
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share, one field each, named so that a cause comes before its consequences."""
        fields = self.info.model_dump(mode="json")
        shares = fields.pop("sources", [])
        fields = {name: value for name, value in fields.items() if name not in ("source_of", "sequence_fingerprints")}
        if not fields.get("begins_with"):
            fields.pop("begins_with", None)  # nothing is added: the text is what it was before this was written down
        mix = {f"{name}s": [share[name] for share in shares] for name in ("weight", "split") if shares}
        fields = {"dataset": fields.pop("dataset"), **mix, **fields}
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
        origins = [Origin(share.dataset, share.split, share.weight) for share in info.sources or ()]
        every = info.source_of or (0,) * len(self.sequences)
        source_of = [every[index] for index in indices]
        described = describe(
            taken,
            source_of,
            origins or [Origin(info.dataset, info.split)],
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
        yield from self.notes
        if len(self.sequences) < asked:
            yield f"the text holds only {len(self.sequences)} of the {asked} sequences asked for"


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
        self._cut = (
            _windows(source.rows, tokenizer, length, list(beginning))
            if self._packed
            else _rows(source.rows, tokenizer, length)
        )

    def __iter__(self) -> SequenceReader:
        return self

    def __next__(self) -> tuple[int, ...]:
        for ids in self._cut:
            if len(ids) >= 2:
                self.found += 1
                return tuple(ids)
            self.skipped += 1
        if not self.found:
            raise CalibrationError(_nothing_found(self.source, self.length, self.skipped, self._packed))
        raise StopIteration


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
    origins = [Origin(source.name, source.split)]
    info = describe(found, [0] * len(found), origins, sequence_length, seed, beginning.tokens)
    return CalibrationSet(tuple(found), info, reader.skipped)


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


def _rows(rows: Iterator[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    for row in rows:
        read = PIECE_CHARACTERS
        ids = token_ids(tokenizer, row[:read])
        while read < len(row) and len(ids) < 2 * length:  # far enough from where the row was cut
            read *= 4
            ids = token_ids(tokenizer, row[:read])
        yield ids[:length]


def _windows(rows: Iterator[str], tokenizer: Any, length: int, beginning: list[int]) -> Iterator[list[int]]:
    """Join the rows and cut windows; a tokenizer's end mark, where it has one, stands between two rows.

    beginning: stands before the tokens of a window, unless they begin with it: many models lay their attention sink
    there, and are not themselves without it.
    """
    buffer: list[int] = []
    for ids in _joined(rows, tokenizer):
        buffer += ids
        while True:
            added = [] if buffer[: len(beginning)] == beginning else beginning
            taken = length - len(added)
            if len(buffer) < max(taken, len(beginning)):  # too short for a window, or to know what it begins with
                break
            yield added + buffer[:taken]
            del buffer[:taken]


def _joined(rows: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yield the tokens of one row after the other, in pieces."""
    last: list[int] = []
    for row in rows:
        for place, piece in enumerate(_pieces(row)):
            ids = token_ids(tokenizer, piece, marks=place == 0)
            if len(piece) < len(row) and ids[-1:] == [tokenizer.eos_token_id]:
                ids.pop()  # the row goes on
            last = ids[-1:] or last
            yield ids
        if tokenizer.eos_token_id is not None and last != [tokenizer.eos_token_id]:
            last = [tokenizer.eos_token_id]
            yield last


def _pieces(row: str) -> Iterator[str]:
    """Cut a row that is a book, where it has a space, so that no more of it is read than is used."""
    start = 0
    while len(row) - start > PIECE_CHARACTERS:
        stop = row.rfind(" ", start + 1, start + PIECE_CHARACTERS)
        stop = stop if stop > start else start + PIECE_CHARACTERS
        yield row[start:stop]
        start = stop
    yield row[start:]


def _nothing_found(source: TextSource, length: int, skipped: int, packed: bool) -> str:
    where = f"{source.name} ({source.split})"
    if packed:
        return f"{where} is shorter than one window of {length} tokens.\n  Lower --sequence-length, or add text."
    if not skipped:
        return f"{where} holds no text."
    return (
        f"{where} holds no sequence with a target: {skipped} rows were too short.\n"
        "  Give it rows of at least 2 tokens, or add --pack to join them."
    )
