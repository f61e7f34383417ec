"""The two options that every command has: --json and --quiet."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvprof.errors import UsageError

AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the result as JSON, and nothing else, to stdout; `kvprof schema COMMAND` tells its shape."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors; files are written as ever.")]


def speaks(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with --json and --quiet added to its options, said to the console before it begins."""

    @functools.wraps(command)
    def spoken(*args: Any, as_json: bool = False, quiet: bool = False, **kwargs: Any) -> None:
        from kvprof.report.console import speaking

        if as_json and quiet:
            raise UsageError("--json prints the result, --quiet does not; leave out one of them.")
        with speaking(as_json, quiet):
            command(*args, **kwargs)

    own = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson),
        inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
    ]
    spoken.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
    return spoken
