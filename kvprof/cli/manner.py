"""Common parts of all commands: --json, --quiet, --help, placeholders of values, paragraphs of the help."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from kvprof.cli.request import parameters_of, request_of, with_request
from kvprof.errors import UsageError
from kvprof.records.requests.option import OUTPUT

AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as JSON and nothing else; `kvprof schema COMMAND` prints its schema.",
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print errors only; files are written as usual.", rich_help_panel=OUTPUT),
]

PLACEHOLDERS = {bool: "", int: "N", float: "X", Path: "PATH", str: "TEXT"}
"""Types of values, and what the help shows for one; a flag takes none."""


class Command(TyperCommand):
    """A command whose --help stands beside --json and --quiet, in the last panel of its help."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option --help."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = OUTPUT
            option.metavar = PLACEHOLDERS[bool]
        return option


class Group(TyperGroup):
    """The list of commands, whose own options, flags all, take a line each in 80 columns."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options, those that Typer adds among them."""
        options: list[Any] = [*super().get_params(ctx)]
        for option in options:
            option.metavar = PLACEHOLDERS[bool]
            if "--show-completion" in option.opts:
                option.help = "Print what completes words in this shell."
        return options

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return what a word may become: commands that the help does not list, too."""
        for command in self.commands.values():
            command.hidden = False
        return super().shell_complete(ctx, incomplete)


def unwrapped(text: str | None) -> str:
    """Return a docstring with each paragraph on one line: the terminal wraps it at its own width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


def speaks(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of its request, and with --json and --quiet, which the console hears of."""
    request = request_of(command)

    @functools.wraps(command)
    def spoken(*args: Any, as_json: bool = False, quiet: bool = False, **kwargs: Any) -> None:
        from kvprof.report.console import speaking

        if as_json and quiet:
            raise UsageError("--json prints the result, --quiet does not; leave out one of them.")
        with speaking(as_json, quiet):
            command(*args, **(kwargs if request is None else with_request(request, kwargs)))

    added = [
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson),
        inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
    ]
    parameters = [_with_placeholder(parameter) for parameter in (*parameters_of(command, request), *added)]
    spoken.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spoken.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spoken


def _with_placeholder(parameter: inspect.Parameter) -> inspect.Parameter:
    """Let the help show `N` for a number and `PATH` for a file, unless the option or argument has a word of its own."""
    annotation, info = get_args(parameter.annotation)
    if info.metavar is not None:
        return parameter
    info = copy.copy(info)  # commands share it
    is_argument = isinstance(info, typer.models.ArgumentInfo)
    info.metavar = parameter.name.upper() if is_argument else PLACEHOLDERS[_type_of_one(annotation)]
    return parameter.replace(annotation=Annotated[annotation, info])


def _type_of_one(annotation: Any) -> type:
    """Return `str` of `str`, `str | None` and `list[str] | None`."""
    while arguments := get_args(annotation):
        annotation = arguments[0]
    assert isinstance(annotation, type)
    return annotation
