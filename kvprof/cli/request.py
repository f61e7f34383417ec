"""The options of a command, made from the fields of its request."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer

from kvprof.cli import completion
from kvprof.records.requests.option import PANELS, Option

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from kvprof.records.requests.request import Request

Command = Callable[..., None]


def asks(request: str) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the options of a request, for its parameter of this name.

    request: such as `measure.SpectraRequest`, of `kvprof.records.requests`; it is loaded with the options, since the
    list of commands needs neither.
    """

    def note(command: Command) -> Command:
        command.__dict__["request"] = request
        return command

    return note


def request_of(command: Command) -> type[Request] | None:
    """Return the request that a command takes, if it takes one."""
    name = command.__dict__.get("request")
    found: type[Request] | None = None if name is None else resolve_name(f"kvprof.records.requests.{name}")
    return found


def parameters_of(command: Command, request: type[Request] | None) -> list[inspect.Parameter]:
    """Return what a command takes, the options of its request in that one's place; panel by panel, in order."""
    known = {} if request is None else {request.__name__: request}
    own = inspect.signature(command, eval_str=True, locals=known).parameters
    found: list[inspect.Parameter] = []
    for name, parameter in own.items():
        found += _options(request) if request is not None and name == "request" else [parameter]
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in sorted(found, key=_panel)]


def _panel(parameter: inspect.Parameter) -> int:
    return PANELS.index(get_args(parameter.annotation)[1].rich_help_panel)


def with_request(request: type[Request], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a command is called with, its request made; raises UsageError for one that cannot be."""
    rest = {name: value for name, value in given.items() if name not in request.model_fields}
    return {**rest, "request": request.of(given)}


def _options(request: type[Request]) -> Iterator[inspect.Parameter]:
    for name, field in request.model_fields.items():
        option = next((note for note in field.metadata if isinstance(note, Option)), None)
        assert option is not None, f"{request.__name__}.{name} has no Option"
        yield _option(name, field, option)


def _option(name: str, field: FieldInfo, option: Option) -> inspect.Parameter:
    typed = _typed(field.annotation)
    flag = f"--{(field.alias or name).replace('_', '-')}"
    default = field.default
    words: list[str] = [f"{flag}/--no-{flag[2:]}" if default is True else flag, *([option.also] if option.also else [])]
    low, high = _bounds(field) if option.shows_range else (None, None)
    info = typer.Option(
        *words,
        help=option.help,
        rich_help_panel=option.panel,
        show_default=option.default or default is not None,
        min=low,
        max=high,
        autocompletion=_completion(option, typed),
    )
    kind = str if option.commas else Path if option.is_path else typed.kind
    annotation: Any = list[kind] if typed.is_several else kind  # type: ignore[valid-type]
    if default is None:
        annotation = annotation | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


class _Typed(NamedTuple):
    """What a command line reads for a field: the type of one value, whether there may be several, the words."""

    kind: type
    is_several: bool = False
    words: tuple[str, ...] = ()


def _typed(annotation: Any) -> _Typed:
    """Return what a command line reads for a type: text for a number that may be typed as text too."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _Typed(str, words=arguments)
    if origin is tuple:
        return _typed(arguments[0])._replace(is_several=True)
    if origin in (Union, UnionType):
        return _typed(next(part for part in arguments if part is not NoneType))
    if origin is Annotated:
        return _typed(arguments[0])
    return _Typed(annotation)


def _bounds(field: FieldInfo) -> tuple[float | None, float | None]:
    """Return the least and the largest value of a field's number."""
    from kvprof.records.document import LARGEST_COUNT

    notes = list(field.metadata)
    part: Any = field.annotation
    while arguments := get_args(part):
        for note in arguments[1:] if get_origin(part) is Annotated else ():
            notes += getattr(note, "metadata", [note])
        part = arguments[0]

    least = max((note.ge for note in notes if hasattr(note, "ge")), default=None)
    most = min((note.le for note in notes if hasattr(note, "le")), default=None)
    return least, None if most == LARGEST_COUNT else most


def _completion(option: Option, typed: _Typed) -> Callable[[str], list[str]] | None:
    if option.words is not None:
        complete: Callable[[str], list[str]] = getattr(completion, option.words)
        return complete
    return completion.among(typed.words) if typed.words else None
