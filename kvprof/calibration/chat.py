"""Chats: the turns of a conversation, and their text as a tokenizer's chat template writes it.

Reads messages as people keep them; asks a tokenizer for its template. Does not know which column they stood in.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvprof.errors import first_line

_ROLES = ("role", "from", "speaker")
_CONTENTS = ("content", "value", "text")
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
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
"""Names of a column, or of a field of a record, that holds a chat."""
_MOST_NESTED = 3
"""Records within each other that are looked through for a chat."""

Turn = tuple[str, str]
"""A role and what it says."""


@dataclass(frozen=True)
class Chat:
    """The turns of a conversation. `text`: role by role, for tokenizers that have no template."""

    turns: tuple[Turn, ...]

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
    return isinstance(value, list) and any(
        isinstance(message, Mapping) and _field(message, _ROLES) is not None and _field(message, _CONTENTS) is not None
        for message in value
    )


def turns_of(value: object) -> tuple[Turn, ...]:
    """Return the turns of a list of messages that hold text, in the words of templates: user, assistant, system, tool.

    value: the list; one as JSON, or as Python writes it; a record that holds it (`{"messages": [...]}`, also within one
    more); or the fields of its messages each as a list (as datasets keeps a sequence of records). A message's content is text, or a list of parts of which those of text are taken. Messages that are bare
    texts are said by turns, the user's first.
    """
    messages = _decoded(value)
    if is_texts(messages):
        speakers = ("user", "assistant")
        return tuple((speakers[number % 2], text) for number, text in enumerate(messages) if text.strip())
    if not isinstance(messages, list):  # a row of a column that is a chat in others
        return ()
    return tuple(turn for message in messages for turn in _turn(message))


def is_texts(value: object) -> bool:
    """Whether a value is a list of bare texts, two at least."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def _turn(message: object) -> Iterator[Turn]:
    if not isinstance(message, Mapping):
        return
    role_key, content_key = _field(message, _ROLES), _field(message, _CONTENTS)
    content = _text(message.get(content_key)) if content_key is not None else ""
    if role_key is not None and isinstance(message[role_key], str) and content.strip():
        role = message[role_key].strip().lower()
        yield _ROLE_OF.get(role, role), content


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
    text = part.get("text")
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
    if all(isinstance(field, list) for field in value.values()):
        return [dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=False)]
    records = [field for field in value.values() if isinstance(field, Mapping)]
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

    refused: how many chats the template could not write. why: the first reason.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.refused = 0
        self.why = ""

    def write(self, chat: Chat) -> str | None:
        """Return a chat as text, with the marks of a template where there is one; None where the template refuses it.

        A template without a system role gets that turn within the user's first one, as do turns in a row of one role.
        """
        if not self.has_template:
            return chat.text
        why = "it leaves out what the turns say"
        for turns in dict.fromkeys((chat.turns, _alternating(chat.turns))):
            for in_parts in (False, True):  # some templates of multimodal models read nothing but lists of parts
                try:
                    text = self._apply(turns, in_parts)
                except Exception as error:  # a template is code of the model's, and may raise anything
                    why = first_line(error)
                    continue
                if any(content.strip() in text for _, content in turns):
                    return text
        self.refused += 1
        self.why = self.why or why
        return None

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
