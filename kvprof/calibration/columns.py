"""What of a row is text: one column, the messages of a chat, columns that are its turns, or a template of columns.

Decides by the names of columns and by what stands in the first rows; never takes an id, a link, a label or a hash for
text. Reads rows; does not know where they come from, nor tokens.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from kvprof.calibration.chat import CHAT_COLUMNS, Chat, Row, aside_of, is_messages, is_texts, turns_of
from kvprof.calibration.values import UNSPACED, are_references, hardly_text, not_text
from kvprof.errors import CalibrationError, UsageError, did_you_mean

Fields = Mapping[str, Any]

TEXT_COLUMNS = ("text", "content")
PAIRS = (
    ("instruction", ("instruction", "context", "input"), ("output", "response", "completion", "answer", "answers")),
    ("prompt", ("prompt", "context"), ("completion", "response", "chosen", "output", "answer", "answers")),
    ("question", ("context", "question"), ("answer", "answers", "response", "solution", "output", "completion")),
    ("query", ("context", "query"), ("response", "answer", "answers", "output")),
    ("problem", ("context", "problem"), ("solution", "answer", "answers", "response", "output")),
    ("input", ("context", "input"), ("output", "response", "preferred_output")),
    ("inputs", ("inputs",), ("targets",)),
    ("user", ("user",), ("assistant", "bot", "response")),
    ("human", ("human",), ("assistant", "gpt", "bot")),
)
"""The column that must ask, all that ask in their order, and those of which the first one answers."""
SYSTEM_COLUMNS = ("system", "system_prompt")
LATER_COLUMNS = ("prompt", "document")
"""Names of a column of text where no other answers it."""

_NOT_TEXT = re.compile(
    r"(.*[_ .-])?(ids?|idx|index|uuid|guid|uid|urls?|uri|link|href|labels?|hash|md5|sha1|sha256|sha512|sha|checksum|"
    r"digest|fingerprint|date|time|timestamp|created|updated|modified|lang|language|source|split|subset|dataset|"
    r"category|class|genre|sentiment|emotion|intent|score|rating|stars|difficulty|path|file|filename|images?|audio|"
    r"video|license|author|domain|country|gender|type|model|role|version|tags?|name|key|method|status|doi|isbn|email|"
    r"rejected)([_ .-]?\d+)?"
)
_BY_NAME = "no text by its name"


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    name: what the reading is called, as --column takes it again. used: the columns it takes. aside: the others.
    """

    name: str
    used: tuple[str, ...]
    aside: tuple[str, ...]
    take: Callable[[Fields], Row | None]
    """A row's text; None where it has none."""


def choose_reading(rows: Sequence[Fields], column: str | None = None) -> Reading:
    r"""Return how to read rows, by the first of them.

    column: a column by its name, several joined by + that are the turns of a chat, or a template such as
    "{question}\n{answer}"; None chooses.
    Raises CalibrationError where that is not to be told, UsageError for a column that is not there; both list the
    columns.
    """
    table = _Table(rows)
    found = table.chosen() if column is None else table.asked(column)
    if found is None:
        raise CalibrationError(f"cannot tell which column is text; found {table.described()}.\n  {table.advice()}")
    return found


def texts_beside(row: Fields, reading: Reading) -> list[str]:
    """Return the columns of a row that hold text or a chat, and that a reading does not take."""
    return _Table([row]).texts_beside(reading.used)


class _Table:
    """The columns of some rows, and what they hold."""

    def __init__(self, rows: Sequence[Fields]) -> None:
        self._rows = rows
        self.names = list(dict.fromkeys(name for row in rows for name in row))
        self._values = {name: [row[name] for row in rows if row.get(name) is not None] for name in self.names}
        self._chats: dict[str, bool] = {}
        self._by_case: dict[str, str] = {}
        for name in self.names:
            self._by_case.setdefault(str(name).casefold(), name)

    def chosen(self) -> Reading | None:
        """Return the reading that the columns' names and values speak for, but where another reads twice as many."""
        found = (
            self._first_text(TEXT_COLUMNS),
            self._first_chat(),
            self._first_pair(),
            self._first_text(LATER_COLUMNS),
        )
        named = [(reading, self._taken(reading)) for reading in found if reading is not None]
        most = max((taken for _, taken in named), default=0)
        usual = next((reading for reading, taken in named if 2 * taken > most), None)
        if usual is not None:
            return usual
        by_name_alone = self._first_text((*TEXT_COLUMNS, *LATER_COLUMNS), hardly=True)
        if by_name_alone is not None:
            return self._only_text() or by_name_alone
        return self._without_values() or self._only_text()

    def described(self) -> str:
        """Return the columns, those that are no text with what they hold."""
        what = [(name, self._no_text(name)) for name in self.names]
        return ", ".join(name if kind is None else f"{name} ({kind})" for name, kind in what) or "no columns"

    def advice(self) -> str:
        """Return what to do where no column is chosen: those that can be text are named, and no others."""
        texts = [name for name in self.names if self._no_text(name) is None]
        if texts:
            plain = [name for name in texts if not self._is_chat(name)][:2]
            template = "\\n".join(f"{{{name}}}" for name in plain)
            several = f", or several in a template such as --column {shlex.quote(template)}" if len(plain) > 1 else ""
            return f"Name one with --column {shlex.quote(str(texts[0]))}{several}."
        named = [name for name in self.names if self._no_text(name) == _BY_NAME and self._has_sentences(name)]
        if named:
            return f"If {named[0]} is text in spite of its name, take it with --column {shlex.quote(str(named[0]))}."
        packed = [name for name in self.names if _held_kind(self._values[name]) in ("lists", "records")]
        of_what = f" of what {' or '.join(packed[:3])} holds" if packed else ""
        return (
            f"None of them is text. Write the text{of_what} into a column 'text', or a chat into 'messages', a list of "
            'records such as {"role": "user", "content": "..."}.'
        )

    def texts_beside(self, used: Sequence[str]) -> list[str]:
        """Return the columns but some that hold text or a chat."""
        return [name for name in self.names if name not in used and self._no_text(name) is None]

    def asked(self, column: str) -> Reading:
        """Return the reading that --column asks for."""
        if column in self._values:
            return self._chat(column) if self._is_chat(column) else self._text(column)
        template = column.replace("\\n", "\n").replace("\\t", "\t")
        fields = _fields(template)
        if fields:
            self._check_there(fields, column)
            return self._reading(template, fields, lambda row: _filled(template, row))
        turns = column.split("+")
        if len(turns) > 1:
            self._check_there(turns, column)
            return self._turns(turns[:-1], turns[-1])
        self._check_there([column], column)
        raise AssertionError("a column that is there was found above")

    def _first_text(self, names: Iterable[str], hardly: bool = False) -> Reading | None:
        """Return the first of some columns that holds text or a chat. hardly: also what is text by its name alone."""
        for name in self._known(names):
            values = self._values[name]
            if self._holds_text(name) and not not_text(values) and (hardly or not hardly_text(values)):
                return self._text(name)
            if self._is_chat(name):
                return self._chat(name)
        return None

    def _first_chat(self) -> Reading | None:
        usual = [name for name in self._known(CHAT_COLUMNS) if self._is_chat(name)]
        others = [name for name in self.names if self._is_chat(name)]
        chosen = [name for name in others if name.casefold() == "chosen"]
        found = usual or (others if len(others) == 1 else chosen)
        return self._chat(found[0]) if found else None

    def _first_pair(self) -> Reading | None:
        for needed, asking, answering in PAIRS:
            asks = [name for name in self._known(asking) if self._may_ask(name)]
            answers = [name for name in self._known(answering) if self._answers(name)]
            if answers and any(name in asks and self._speaks(name) for name in self._known([needed])):
                return self._turns(asks, answers[0])
        return None

    def _only_text(self) -> Reading | None:
        found = [name for name in self.names if self._holds_text(name) and self._no_text(name) is None]
        return self._text(found[0]) if len(found) == 1 else None

    def _without_values(self) -> Reading | None:
        """Return a column of text by its name, where no column of the first rows holds any.

        Raises CalibrationError for such a column that holds something else.
        """
        for name in self._known((*TEXT_COLUMNS, *LATER_COLUMNS)):
            if not self._holds_only(name, str):
                raise _holds_no_text(name, next(value for value in self._values[name] if not isinstance(value, str)))
            if not any(map(self._holds_text, self.names)):
                return self._text(name)
        return None

    def _text(self, name: str) -> Reading:
        def take(row: Fields) -> str | None:
            text = row.get(name)
            if text is not None and not isinstance(text, str):
                raise _holds_no_text(name, text)
            return text if text and text.strip() else None

        return self._reading(name, [name], take)

    def _chat(self, name: str) -> Reading:
        system = self._system()

        def take(row: Fields) -> Chat | None:
            turns = turns_of(row.get(name))
            return Chat(_with_system(row, system, turns), aside_of(row[name])) if turns else None

        return self._reading(name, [name, *system], take)

    def _turns(self, asking: Sequence[str], answering: str) -> Reading:
        """Return the reading of a chat of two turns: one column or several that ask, and one that answers."""
        system = [name for name in self._system() if name not in (*asking, answering)]

        def take(row: Fields) -> Chat | None:
            asked = [turn for name in asking for turn in _as_turns(row.get(name), "user")]
            answered = _as_turns(row.get(answering), "assistant")
            if not asked or not answered:
                return None
            if any(role == "user" for role, _ in answered):  # the whole chat, its question too
                return Chat(_with_system(row, system, answered), aside_of(row[answering]))
            if all(role == "user" for role, _ in asked):
                asked = [("user", "\n".join(content for _, content in asked))]
            aside = [other for name in (*asking, answering) for other in aside_of(row.get(name))]
            return Chat(_with_system(row, system, (*asked, *answered)), tuple(aside))

        return self._reading("+".join((*asking, answering)), [*asking, answering, *system], take)

    def _reading(self, name: str, used: Sequence[str], take: Callable[[Fields], Row | None]) -> Reading:
        return Reading(name, tuple(used), tuple(other for other in self.names if other not in used), take)

    def _taken(self, reading: Reading) -> int:
        """Return how many rows have text as a reading takes it."""
        return sum(reading.take(row) is not None for row in self._rows)

    def _known(self, names: Iterable[str]) -> Iterator[str]:
        """Yield the columns of some names, capital letters aside where no column has the very name."""
        for name in names:
            if name in self._values or name in self._by_case:
                yield name if name in self._values else self._by_case[name]

    def _system(self) -> list[str]:
        return [name for name in self._known(SYSTEM_COLUMNS) if self._holds_only(name, str)][:1]

    def _holds_only(self, name: str, kind: type) -> bool:
        return all(isinstance(value, kind) for value in self._values[name])

    def _holds_text(self, name: str) -> bool:
        values = self._values[name]
        return self._holds_only(name, str) and any(value.strip() for value in values) and not self._is_chat(name)

    def _is_chat(self, name: str) -> bool:
        if name not in self._chats:  # asked often, and long JSON takes its time
            self._chats[name] = self._holds_chat(name)
        return self._chats[name]

    def _holds_chat(self, name: str) -> bool:
        values = [value for value in self._values[name] if value not in ("", [], "[]", {}, "{}")]
        return sum(map(is_messages, values)) > len(values) / 2 or (
            name.casefold() in CHAT_COLUMNS
            and bool(values)
            and all(map(is_texts, values))
            and not are_references([text for texts in values for text in texts])
        )

    def _speaks(self, name: str) -> bool:
        """Whether a column holds what one side of a chat says, as text or as messages."""
        return self._is_chat(name) or (self._holds_text(name) and not are_references(self._values[name]))

    def _answers(self, name: str) -> bool:
        """Whether a column holds answers: one a row as text or as messages, or several, as a list of texts."""
        if self._speaks(name):
            return True
        said = [_first_said(value) for value in self._values[name] if value]
        listed = all(isinstance(value, list | Mapping) for value in self._values[name])
        return listed and any(said) and not are_references(said)

    def _may_ask(self, name: str) -> bool:
        """Whether a column can be a part of a question, which some or all rows do without."""
        return self._is_chat(name) or (self._holds_only(name, str) and not are_references(self._values[name]))

    def _no_text(self, name: str) -> str | None:
        """Return what a column holds that is neither text nor a chat; None where it may be either."""
        values = self._values[name]
        if self._is_chat(name):
            return None
        if not self._holds_only(name, str):
            return _held_kind(values)
        if not any(value.strip() for value in values):
            return "empty"
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).casefold()
        return not_text(values) or hardly_text(values) or (_BY_NAME if _NOT_TEXT.fullmatch(words) else None)

    def _has_sentences(self, name: str) -> bool:
        return any(len(value.split()) > 2 or max(value, default="") >= UNSPACED for value in self._values[name])

    def _check_there(self, wanted: Iterable[str], column: str) -> None:
        for name in wanted:
            if name not in self._values:
                nearest = did_you_mean(name, self.names) if self.names else "the rows have no columns"
                raise UsageError(f"--column {column!r}: there is no column {name!r}: {nearest}")


def _with_system(row: Fields, system: Sequence[str], turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return turns behind what a column of its own tells the system, where they have no such turn."""
    said = [row[name] for name in system if isinstance(row.get(name), str) and row[name].strip()]
    has_own = bool(turns) and turns[0][0] == "system"
    return (*(("system", text) for text in said if not has_own), *turns)


def _as_turns(value: object, role: str) -> list[tuple[str, str]]:
    if is_messages(value):
        return list(turns_of(value))
    said = _first_said(value)
    return [(role, said)] if said.strip() else []


def _first_said(value: object) -> str:
    """Return the first text of a value that is one text or several, as answers to one question are."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in ("text", "value", "answer") if value.get(name)), None)
    if isinstance(value, list):
        return next((said for said in map(_first_said, value) if said.strip()), "")
    return value if isinstance(value, str) else ""


def _fields(template: str) -> list[str]:
    """Return the columns that a template names, none where it is no template."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError:
        return []
    return list(dict.fromkeys(_field(part) for part in parts if part[1] is not None))


def _field(part: tuple[str, str | None, str | None, str | None]) -> str:
    """Return a field's name as it was written: what Python would read as a format is a part of it."""
    _, name, form, conversion = part
    return f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"


def _filled(template: str, row: Fields) -> str | None:
    """Return a template with a row's columns in their places; None where none of them holds anything."""
    text, held = "", False
    for part in Formatter().parse(template):
        text += part[0]
        if part[1] is not None:
            value = row.get(_field(part))
            if isinstance(value, list | dict):
                raise _holds_no_text(_field(part), value)
            written = "" if value is None else str(value)
            held = held or bool(written.strip())
            text += written
    return text if held else None


def _holds_no_text(name: str, value: object) -> CalibrationError:
    what = "its text" if isinstance(value, list | dict) else "text"
    return CalibrationError(
        f"the column {name!r} holds {type(value).__name__}, not text.\n"
        f"  Write {what} into a column of its own, or name another with --column."
    )


def _held_kind(values: Sequence[object]) -> str:
    """Return what values that are no text are, in the plural."""
    kinds = {list: "lists", dict: "records", bytes: "bytes", bool: "yes or no", int: "numbers", float: "numbers"}
    others = (value for value in values if not isinstance(value, str))
    return next((kinds.get(type(value), type(value).__name__) for value in others), "empty")
