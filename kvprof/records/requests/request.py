"""The base of all requests: a frozen record that says in a user's words what it does not take."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from typing_extensions import Self

from kvprof.errors import UsageError, did_you_mean
from kvprof.records.document import Count, Integer, Record, Text, brief
from kvprof.records.formats import parse_formats
from kvprof.records.requests.option import WINDOW, Option
from kvprof.records.words import parse_memory, read_layers

T = TypeVar("T")
V = TypeVar("V")

LARGEST_WINDOW = 2**31
QUOTED = re.compile(r"'([^']*)'")
NEEDED = {
    "bool": "True or False is needed",
    "int": "a whole number is needed",
    "string_type": "a word is needed",
    "string_too_short": "it names nothing",
    "string_unicode": "it is not text in UTF-8",
    "literal_error": "a word is needed",
    "too_short": "it names nothing; leave it out",
    "greater_than_equal": "at least {ge} is needed",
    "less_than_equal": "at most {le} is possible",
}
"""What to give instead, by how pydantic's name for the fault begins."""


def refusing(read: Callable[[V], T]) -> Callable[[V], T]:
    """Return a reader for a validator: pydantic collects a ValueError, and lets a UsageError through."""

    def validator(value: V) -> T:
        try:
            return read(value)
        except UsageError as error:
            raise ValueError(str(error)) from None

    return validator


def one_or_several(value: object) -> object:
    """Take a single value for a list of one, and a path for its text."""
    if isinstance(value, str | int | float | dict | os.PathLike):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{brief(value)} is no text, and no list of texts")
    return [str(one) if isinstance(one, os.PathLike) else one for one in value]


def _joined(value: object) -> object:
    """Take a list for its words between commas."""
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"{brief(value)} is no text, and no list of texts")
    return value if isinstance(value, str) else ",".join(map(str, value))


def _known_formats(formats: str) -> str:
    if formats != "none":
        parse_formats(formats)
    return formats


def _known_layers(layers: str) -> str:
    read_layers(layers, "--layers")
    return layers


def _known_memory(memory: str) -> str:
    parse_memory(memory)
    return memory


Flag = Annotated[bool, Field(strict=True)]
Word = Annotated[Text, Field(min_length=1)]
Several = Annotated[tuple[T, ...], BeforeValidator(one_or_several), Field(min_length=1)]
Seed = Annotated[Integer, Field(ge=0, le=2**32 - 1)]
WindowTokens = Annotated[Count, Field(le=LARGEST_WINDOW)]
PathText = Annotated[Text, BeforeValidator(lambda path: str(path) if isinstance(path, os.PathLike) else path)]
MemoryWord = Annotated[Word, AfterValidator(refusing(_known_memory))]
Formats = Annotated[Text, BeforeValidator(_joined), AfterValidator(refusing(_known_formats))]
ListedLayers = Annotated[Word, AfterValidator(refusing(_known_layers))]
LayerChoice = Literal["all", "full"]
SlidingLayers = Annotated[
    LayerChoice | None,
    Option(
        "Sliding-window layers: `all` quantizes them too, `full` keeps them in 16 bits.",
        WINDOW,
        default="all, where that saves memory",
    ),
]
RECENT_TOKENS = "Last tokens, kept in full precision."
SINK_TOKENS = "First tokens, kept in full precision."


class Request(Record):
    """What a command is asked for. Only what was asked for otherwise than by default is worth writing."""

    @classmethod
    def of(cls, options: Mapping[str, Any], of_function: bool = False) -> Self:
        """Return the request among a caller's options; others are left alone.

        of_function: they are keywords of a Python function, which a message names as `seed=-1`, not as `--seed -1`.
        Raises UsageError, naming the option and the value, for the first one that no request can hold.
        """
        given = {field.alias or name: options[name] for name, field in cls.model_fields.items() if name in options}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise UsageError(_explained(error, as_keyword if of_function else as_option)) from None

    def said(self) -> dict[str, Any]:
        """Return what was asked for by name, without what is so by default."""
        return {
            name: value
            for name, field in type(self).model_fields.items()
            if (value := getattr(self, name)) is not None and value != field.default
        }


def as_option(name: str, value: str = "") -> str:
    """Return a field as a command line has it."""
    return f"--{name.replace('_', '-')} {value}".rstrip()


def as_keyword(name: str, value: str = "") -> str:
    """Return a field as a call in Python has it."""
    return f"{name}={value}".rstrip("=")


def _explained(error: ValidationError, spelled: Callable[..., str]) -> str:
    """Return what is wrong with the first option that does not fit. spelled: makes its name and value words."""
    faults = error.errors(include_url=False)
    if faults[0]["type"] == "value_error":  # a validator's own sentence, which names options as a command line has them
        message = str(faults[0]["ctx"]["error"])
        return re.sub(r"--([a-z-]*[a-z])", lambda found: spelled(found[1].replace("-", "_")), message)
    name = str(faults[0]["loc"][0])
    fault = [fault for fault in faults if fault["loc"][0] == name][-1]  # of a text or a number: a number
    value = brief(fault["input"])
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        nearest = did_you_mean(fault["input"], re.findall(QUOTED, fault["ctx"]["expected"]))
        return f"unknown {spelled(name)} {value}: {nearest}"
    said = f"{fault['msg'][0].lower()}{fault['msg'][1:]}"
    words = (words for kind, words in NEEDED.items() if fault["type"].startswith(kind))
    needed = next((one.format(**fault.get("ctx", {})) for one in words), said)
    return f"{spelled(name, value)}: {needed}."
