"""What a reader should know of a calibration text: what was read of it, and what makes it mislead.

Counts rows and looks at tokens; pure functions of both. Does not know where the text came from, nor the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_high
from typing import TypeVar

from kvprof.records.words import counted

SHORT_ROW = 32
"""Tokens: most rows shorter than this are headings or lines, rather than texts."""
FEW_TOKENS = 100
"""Distinct tokens: fewer are no text of a language."""
BYTES_AND_MARKS = 300
"""A vocabulary of bytes and a few marks: of such a model's tokens, text has few by nature."""
MARKED_SHARE = 0.1
"""Of rows with another model's marks: fewer may be text about them."""

_MARKS = re.compile(
    r"<\|[A-Za-z_][\w .-]{0,40}\|>|<｜[^<>｜]{1,40}｜>|\[/?INST\]|<</?SYS>>|</?s>|"  # noqa: RUF001 - as DeepSeek has it
    r"<(?:bos|eos|pad|unk|start_of_turn|end_of_turn|start_of_role|end_of_role|end_of_text)>|\[(?:CLS|SEP|gMASK)\]"
)
"""Special tokens of well-known language models, as they look in plain text."""
_LOOKED_AT = 2**16
"""Characters of a row that are searched for marks."""


T = TypeVar("T")


@dataclass
class RowCounts:
    """What was read of one text, row by row.

    column: how rows were read, None where they have no columns. aside: what is left aside, in words. held: rows that
    there are, as far as they were looked at; ended: whether that is all. blank: rows without text; blank_with: what
    other columns of text the first of them have. lengths: tokens of
    each row that was used. cut: whether a row was longer than was read of it. marks: rows that hold a special token in
    plain text, by token. chats: rows that are chats. beside: messages of theirs that hold something beside text, by
    what it is.
    """

    column: str | None = None
    aside: tuple[str, ...] = ()
    held: int = 0
    ended: bool = False
    blank: int = 0
    blank_with: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    cut: bool = False
    marks: Counter[str] = field(default_factory=Counter)
    chats: int = 0
    beside: Counter[str] = field(default_factory=Counter)

    def held_in(self, rows: Iterable[T]) -> Iterator[T]:
        """Yield rows, and count them."""
        for row in rows:
            self.held += 1
            yield row
        self.ended = True

    def see(self, text: str) -> None:
        """Look for special tokens in a row of plain text."""
        self.marks.update(set(_MARKS.findall(text, 0, _LOOKED_AT)))


def reading_remark(
    name: str, rows: RowCounts, by_template: bool, refused: int, why: str, left_out: Mapping[str, int]
) -> str:
    """Return in one sentence what was read of a text.

    by_template: whether chats were written by the tokenizer's template. refused: chats that it could not write.
    left_out: turns that it does not write, by role.
    """
    parts = []
    if rows.column is not None:
        parts.append(f"column {rows.column!r}" if "{" not in rows.column else f"columns as {rows.column!r}")
    if rows.chats:
        how = "by the tokenizer's chat template" if by_template else "role by role: the tokenizer has no chat template"
        parts.append(f"chats written {how}")
    typical = median_high(rows.lengths) if rows.lengths else 0
    least = "at least " if rows.cut and typical == max(rows.lengths) else ""
    parts.append(f"{_rows_read(rows)}, of {least}{counted(typical, 'token')} in the median")
    aside = [*rows.aside]
    if rows.blank:
        other = f" (they hold text in {_listed(list(rows.blank_with))})" if rows.blank_with else ""
        aside.append(f"{counted(rows.blank, 'row')} without text{other}")
    if refused:
        aside.append(f"{counted(refused, 'chat')} that the chat template cannot write ({why})")
    aside += [f"{what} in {counted(number, 'message')}" for what, number in rows.beside.items()]
    aside += [
        f"{counted(number, f'{role} turn')} that the chat template leaves out" for role, number in left_out.items()
    ]
    if aside:
        parts.append(f"left aside: {', '.join(aside)}")
    return f"{name}: {'; '.join(parts)}"


def _rows_read(rows: RowCounts) -> str:
    number = len(rows.lengths)
    if number == rows.held or not rows.held:
        return f"{counted(number, 'row')} read"
    return f"{number:,} of {'' if rows.ended else 'more than '}{counted(rows.held, 'row')} read"


def row_remarks(name: str, rows: RowCounts, packed: bool, known: Collection[str]) -> Iterator[str]:
    """Yield what of a text's rows misleads. known: the special tokens of the model's own tokenizer."""
    number = len(rows.lengths)
    other = "another column with --column" if rows.column is not None else "other text with --data"
    short = sum(length < SHORT_ROW for length in rows.lengths)
    if short > number / 2:
        mend = "put a whole text in each row" if packed else "add --pack to join them"
        yield (
            f"most rows of {name}, {short} of {number}, are shorter than {SHORT_ROW} tokens, as headings are: "
            f"{mend}, or name {other}"
        )
    marked = {mark: count for mark, count in rows.marks.items() if count > MARKED_SHARE * number}
    others = [mark for mark in marked if mark not in known]
    if others:
        yield (
            f"{name} holds special tokens of another model in plain text, {_listed(others)}, which this tokenizer "
            f"spells out: name {other}, without them"
        )
    own = [mark for mark in marked if mark in known]
    if own:
        yield (
            f"{name} holds special tokens in plain text, {_listed(own)}, which this tokenizer reads as marks: unless "
            f"the model's own template wrote them, name {other}"
        )


def sequence_remarks(
    sequences: Sequence[Sequence[int]], vocabulary: int | None, has_columns: bool = True
) -> Iterator[str]:
    """Yield what of the sequences that are measured on misleads.

    vocabulary: how many tokens the tokenizer has; None where that is not known. has_columns: whether the rows that they
    were made from have any.
    """
    if not sequences:
        return
    different = len(set(map(tuple, sequences)))
    if different < len(sequences):
        yield (
            f"the same sequence is there more than once, and counts as often: {different} of {len(sequences)} differ. "
            f"Lower --sequences to {different}, raise --sequence-length, or name other text with --data"
        )
    tokens = {token for ids in sequences for token in ids}
    if len(tokens) < FEW_TOKENS and (vocabulary is None or vocabulary > BYTES_AND_MARKS):
        total = sum(map(len, sequences))
        mends = ["name other text with --data"]
        mends += ["another column with --column"] if has_columns else []
        mends += ["take more of it with --sequences and --sequence-length"] if total < 10 * FEW_TOKENS else []
        yield (
            f"the text has only {len(tokens)} distinct tokens, where a language has thousands: {', or '.join(mends)}"
        )


def _listed(marks: Sequence[str]) -> str:
    first = sorted(marks)[:3]
    return ", ".join(first) + (f" and {len(marks) - 3} more" if len(marks) > 3 else "")
