"""Rows of text -> sequences of token ids -> padded batches.

Knows the tokenizer and the lengths; does not know the model, and never measures padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvprof.calibration.text import TextSource
from kvprof.errors import CalibrationError, UsageError
from kvprof.records.scores import CalibrationInfo

USUAL_LENGTH = 512
"""Tokens of a sequence, where nothing else is said."""

IGNORED = -100
"""The label of a position that has no target, by transformers' convention."""


@dataclass(frozen=True)
class CalibrationSet:
    """Sequences of token ids, each at least two tokens long, and where they came from.

    skipped: rows that were too short to have a target.
    """

    sequences: tuple[tuple[int, ...], ...]
    info: CalibrationInfo
    skipped: int

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share, one field each, named so that a cause comes before its consequences."""
        fields = self.info.model_dump(mode="json")
        return {("text fingerprint" if name == "fingerprint" else name): value for name, value in fields.items()}

    def check_vocabulary(self, size: int) -> None:
        """Raise CalibrationError where a model of so large a vocabulary does not know a token."""
        largest = max(max(ids) for ids in self.sequences)
        if largest >= size:
            raise CalibrationError(f"the tokenizer writes token {largest}, but the model's vocabulary has {size}.")

    def remarks(self, asked: int) -> Iterator[str]:
        """Yield what a reader should know of a text that so many sequences were asked of."""
        if self.skipped:
            yield f"skipped {self.skipped} rows too short to have a target"
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


def choose_length(asked: int | None, positions: int | None) -> int:
    """Return the length to cut sequences to, for a model made for so many positions (None: no limit).

    asked: None is USUAL_LENGTH, or what the model was made for where that is less. Raises UsageError for more.
    """
    if asked is None:
        return min(USUAL_LENGTH, positions or USUAL_LENGTH)
    if asked > (positions or asked):
        raise UsageError(f"--sequence-length {asked}: the model was made for {positions}.\n  Try {positions}.")
    return asked


def tokenize(
    source: TextSource, tokenizer: Any, sequences: int, sequence_length: int, seed: int = 0, pack: bool = False
) -> CalibrationSet:
    """Cut calibration text into at most `sequences` sequences of at most `sequence_length` tokens.

    A row is one sequence, truncated on the right; a row too short to have a target is skipped and counted. With `pack`,
    and always for the built-in text, rows are joined and cut into windows of exactly `sequence_length` tokens.
    Raises CalibrationError where no sequence comes of it, UsageError for lengths below 2 or no sequences at all.
    """
    if sequences < 1:
        raise UsageError(f"--sequences {sequences}: at least 1 is needed.")
    if sequence_length < 2:
        raise UsageError(f"--sequence-length {sequence_length}: at least 2 tokens are needed to have a target.")
    packed = pack or source.packed
    cut = _windows if packed else _rows
    found: list[tuple[int, ...]] = []
    skipped = 0
    for ids in cut(source.rows, tokenizer, sequence_length):
        if len(ids) < 2:
            skipped += 1
            continue
        found.append(tuple(ids))
        if len(found) == sequences:
            break
    if not found:
        raise CalibrationError(_nothing_found(source, sequence_length, skipped, packed))
    text = ";".join(",".join(map(str, ids)) for ids in found)
    info = CalibrationInfo(
        dataset=source.name,
        split=source.split,
        sequences=len(found),
        sequence_length=sequence_length,
        tokens=sum(map(len, found)),
        seed=seed,
        fingerprint="sha256:" + hashlib.sha256(text.encode()).hexdigest(),
    )
    return CalibrationSet(tuple(found), info, skipped)


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
        yield tokenizer(row, truncation=False, verbose=False)["input_ids"][:length]


def _windows(rows: Iterator[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Join the rows and cut windows; a tokenizer's end mark, where it has one, stands between two rows."""
    buffer: list[int] = []
    for row in rows:
        buffer += tokenizer(row, truncation=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and buffer[-1:] != [tokenizer.eos_token_id]:
            buffer.append(tokenizer.eos_token_id)
        while len(buffer) >= length:
            yield buffer[:length]
            del buffer[:length]


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
