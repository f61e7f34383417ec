"""Chats: the turns of a conversation, and their text as a tokenizer's chat template writes it.

Reads messages as people keep them; asks a tokenizer for its template. Does not know which column they stood in.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from kvprof.errors import first_line

_ROLES = ("role", "from", "speaker")
_CONTENTS = ("content", "value", "text", "message", "utterance", "parts")
_ROLE_OF = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""Roles by other names, as ShareGPT files have them."""
_ROLES_AS_FIELDS = ("system", "user", "human", "prompter", "assistant", "gpt", "chatgpt", "bot")
"""Roles that are fields of a message without a role; `model` is as often the name of one."""
_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "audio")
"""Fields of a message that a template may write, and that are no text of its content."""
_NO_TEXT, _NO_ROLE = "content that is no text", "text without a role"
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
"""Names of a column, or of a field of a record, that holds a chat."""
_MOST_NESTED = 3
"""Records within each other that are looked through for a chat."""

Turn = tuple[str, str]
"""A role and what it says."""


@dataclass(frozen=True)
class Chat:
    """The turns of a conversation. `text`: role by role, for tokenizers that have no template.

    aside: what messages hold beside their text (`tool_calls`, `image`), once for each message that does.
    """

    turns: tuple[Turn, ...]
    aside: tuple[str, ...] = field(default=(), compare=False)

    @property
    def text(self) -> str:
        """The turns below each other, each behind its role."""
        return "\n\n".join(f"{role}: {content}" for role, content in self.turns)


Row = str | Chat
"""What is text of a row."""


def text_of(row: Row) -> str:
    """Return a row as plain text: the same whatever the tokenizer, so that its hash can decide its split."""
    return row.text if isinstance(row, Chat) else row


def is_messages(value: object) -> bool:
    """Whether a value is a list of messages, of which some may only call tools; as `turns_of` takes it."""
    value = _decoded(value)
    return isinstance(value, list) and any(map(_is_message, value))


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    role, content = _field(value, _ROLES), _field(value, _CONTENTS)
    if role is None and content is None:  # one field a role, and one that answers
        return len({_ROLE_OF.get(name.lower(), name.lower()) for name in value if _is_role(name)}) > 1
    return role is not None and content is not None


def turns_of(value: object) -> tuple[Turn, ...]:
    """Return the turns of a list of messages that hold text, in the words of templates: user, assistant, system, tool.

    value: the list; one as JSON, or as Python writes it; a record that holds it (`{"messages": [...]}`, also within one
    more); or the fields of its messages each as a list (as datasets keeps a sequence of records). A message's content
    is text, or a list of parts of which those of text are taken. A message without role and content may have its turns
    as fields (`{"human": ..., "assistant": ...}`). Messages that are bare texts are said by turns, the user's first.
    """
    messages = _decoded(value)
    if is_texts(messages):
        speakers = ("user", "assistant")
        return tuple((speakers[number % 2], text) for number, text in enumerate(messages) if text.strip())
    if not isinstance(messages, list):  # a row of a column that is a chat in others
        return ()
    return tuple(turn for message in messages for turn in _turn(message))


def aside_of(value: object) -> tuple[str, ...]:
    """Return what a list of messages holds that `turns_of` does not take, once for each message that holds it.

    By the name of the field or the type of the part, or in words where a content is no text or has no role.
    """
    messages = _decoded(value)
    if not isinstance(messages, list) or is_texts(messages):
        return ()
    return tuple(name for message in messages for name in dict.fromkeys(_aside(message)))


def _aside(message: object) -> Iterator[str]:
    if not isinstance(message, Mapping):
        yield _NO_ROLE
        return
    yield from (name for name in _BESIDE_CONTENT if message.get(name))
    content_key = _field(message, _CONTENTS)
    content = message.get(content_key) if content_key is not None else None
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, Mapping) and not _part(part):
            yield str(part.get("type") or _NO_TEXT)
        elif not isinstance(part, str | Mapping | None):
            yield _NO_TEXT
    if _text(content).strip() and not next(_turn(message), None):
        yield _NO_ROLE


def is_texts(value: object) -> bool:
    """Whether a value is a list of bare texts, two at least."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def _turn(message: object) -> Iterator[Turn]:
    """Yield the turns of a message: one, or of a record whose fields are roles, one a field."""
    if not isinstance(message, Mapping):
        return
    role_key, content_key = _field(message, _ROLES), _field(message, _CONTENTS)
    if role_key is None and content_key is None:
        said = [(role, message[role]) for role in message if _is_role(role)]
    else:
        said = [(message.get(role_key), message.get(content_key))]
    for role, content in said:
        text = _text(content)
        if isinstance(role, str) and text.strip():
            role = role.strip().lower()
            yield _ROLE_OF.get(role, role), text


def _is_role(name: object) -> bool:
    return isinstance(name, str) and name.lower() in _ROLES_AS_FIELDS


def _text(content: object) -> str:
    """Return the text of a message's content; of a list, its parts of text one behind the other."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        return ""
    parts = [part if isinstance(part, str) else _part(part) for part in content]
    return "\n".join(part for part in parts if part)


def _part(part: object) -> str:
    if not isinstance(part, Mapping) or part.get("type") not in (None, "text", "input_text", "output_text"):
        return ""
    text = next((part[name] for name in ("text", "value", "content") if part.get(name)), None)
    if isinstance(text, Mapping):
        text = text.get("value")
    return text if isinstance(text, str) else ""


def _field(message: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of some fields that a message has; one without a value only where no other has one."""
    found = [name for name in names if name in message]
    return next((name for name in found if message[name] is not None), found[0] if found else None)


def _decoded(value: object, depth: int = 0) -> Any:
    """Return the list that a value is or holds, whatever it is written as; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _parsed(value)
    if not isinstance(value, Mapping) or not value:
        return value
    held = next((value[name] for name in CHAT_COLUMNS if value.get(name)), None)
    if held is not None:
        return _decoded(held, depth + 1) if depth < _MOST_NESTED else value
    if all(isinstance(entries, list) for entries in value.values()):
        return [dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=False)]
    records = [entry for entry in value.values() if isinstance(entry, Mapping)]
    if len(records) == 1 and depth < _MOST_NESTED:
        inner = _decoded(records[0], depth + 1)
        return inner if isinstance(inner, list) else value
    return value


def _parsed(text: str) -> Any:
    """Return what a text of JSON says, or one of Python as tables of objects are saved; another text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if not any(f"'{name}'" in text for name in (*_ROLES, *CHAT_COLUMNS)):
            return text
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


class ChatWriter:
    """Writes chats by a tokenizer's chat template where it has one, else role by role.

    refused: how many chats the template could not write. why: the first reason. left_out: turns that the template did
    not write, of chats that it wrote, by role.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.refused = 0
        self.why = ""
        self.left_out: Counter[str] = Counter()

    def write(self, chat: Chat) -> str | None:
        """Return a chat as text, with the marks of a template where there is one; None where the template refuses it.

        A template without a system role gets that turn within the user's first one, as do turns in a row of one role.
        Some templates of multimodal models read nothing but lists of parts: of a text and a list, what keeps more turns
        is taken.
        """
        if not self.has_template:
            return chat.text
        why = "it leaves out what the turns say"
        for turns in dict.fromkeys((chat.turns, _alternating(chat.turns))):
            found: list[tuple[str, list[str]]] = []
            for in_parts in (False, True):
                try:
                    text = self._apply(turns, in_parts)
                except Exception as error:  # a template is code of the model's, and may raise anything
                    why = first_line(error)
                    continue
                found.append((text, self._left_out(turns, text, in_parts)))
                if not found[-1][1]:
                    break
            text, left_out = min(found, key=lambda one: len(one[1]), default=("", []))
            if found and len(left_out) < len(turns):
                self.left_out.update(left_out)
                if turns != chat.turns:
                    self.left_out.update(takewhile(lambda role: role == "assistant", (role for role, _ in chat.turns)))
                return text
        self.refused += 1
        self.why = self.why or why
        return None

    def _left_out(self, turns: Sequence[Turn], text: str, in_parts: bool) -> list[str]:
        """Return the roles of the turns that are not in a chat as a template wrote it.

        Asked of the template with a mark behind each turn: two turns may say the same, and a template may cut what
        stands before an answer, or write it as JSON. Where the marks make it fail, the turns' own words are looked for.
        """
        marks = [f"\uf8ff{number}\uf8ff" for number in range(len(turns))]  # a character of private use
        marked = [(role, content + mark) for (role, content), mark in zip(turns, marks, strict=True)]
        try:
            text = self._apply(marked, in_parts)
        except Exception:  # the chat itself was written
            marks = [content.strip() for _, content in turns]
        return [role for (role, _), mark in zip(turns, marks, strict=True) if mark not in text]

    def _apply(self, turns: Sequence[Turn], in_parts: bool) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if in_parts else content}
            for role, content in turns
        ]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))


def _alternating(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return turns for the strictest of templates: user and assistant by turns, the user first."""
    merged: list[Turn] = []
    for role, content in turns:
        role = "assistant" if role == "assistant" else "user"
        if merged and merged[-1][0] == role:
            merged[-1] = (role, f"{merged[-1][1]}\n\n{content}")
        else:
            merged.append((role, content))
    if merged and merged[0][0] == "assistant":
        del merged[0]
    return tuple(merged)
