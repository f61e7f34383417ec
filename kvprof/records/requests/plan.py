"""Requests: what a command can be asked for, as data. Plans keep theirs, so that they can be made again."""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer
from typing_extensions import Self

from kvprof.errors import UsageError
from kvprof.records.document import Count, Integer, Number, Record, Text, brief

NARROWING = ("bits", "formats", "group_size", "min_key_bits", "pin", "tie")
"""What leaves a plan less to choose from than was scored."""


class AllocateRequest(Record):
    """What `allocate` is asked for: of each field an option of the command, and a keyword of the function.

    Null is what was not asked for. A number is a text where it was typed, so that none of its digits is lost.
    """

    budget: Text | Number | None = None
    """Bits an element."""
    unit: Text | None = None
    """What the budget counts: `stored` bits or `nominal` ones."""
    memory: Text | None = None
    """Bytes of cache instead of a budget, such as 1.5GiB."""
    context: Integer | None = None
    """Tokens a sequence that `memory` must hold."""
    batch: Integer | None = None
    """Sequences, likewise."""
    max_kl: Text | Number | None = None
    """Nats a token instead of a budget."""
    rule: Text | None = None
    metric: Text | None = None
    bits: tuple[Integer, ...] | None = None
    """Widths of code to choose from, where scores know no formats."""
    formats: Text | None = None
    group_size: Integer | None = None
    pin: tuple[Text, ...] | None = None
    """Tensors set by hand, such as key:0=8."""
    min_key_bits: Integer | None = None
    tie: Text | None = None
    target: Text | None = None
    """The runtime that the plan is for."""
    layers: Text | None = None
    top_fraction: Text | Number | None = None
    as_published: bool | None = None
    bits_key: Integer | None = None
    bits_value: Integer | None = None
    sink_tokens: Count | None = None
    recent_tokens: Count | None = None
    scores: Text | None = None
    """The file that was named."""

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Return the request of options as a caller gives them; raises UsageError for one that no request can keep."""
        try:
            return cls(**options)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            name = str(faults[0]["loc"][0])
            fault = [fault["msg"] for fault in faults if fault["loc"][0] == name][-1]  # of a number or a text: a number
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {brief(options[name])}: {fault[0].lower()}{fault[1:]}.") from None

    @model_serializer(mode="wrap")
    def _without_nulls(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}

    def said(self) -> dict[str, Any]:
        """Return what was asked for by name, without what was not."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @property
    def narrowing(self) -> tuple[str, ...]:
        """The options given, as a command line has them, that leave less to choose from than was scored."""
        return tuple(f"--{name.replace('_', '-')}" for name in NARROWING if getattr(self, name))
