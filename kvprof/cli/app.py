"""The Typer app: all commands by name and panel; a command's module is imported when the command is needed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any

import typer

from kvprof import __version__
from kvprof.cli.errors import explains_errors
from kvprof.cli.manner import Command, Group, speaks, unwrapped

PANELS = {
    "Measure": {
        "inspect": "measure",
        "norms": "measure",
        "gradients": "measure",
        "spectra": "measure",
        "divergence": "measure",
    },
    "Plan": {"allocate": "allocate", "frontier": "frontier", "explain": "explain"},
    "Check": {"evaluate": "evaluate", "verify": "verify", "audit": "audit", "benchmark": "benchmark", "show": "show"},
    "Share": {"report": "report", "export": "exchange", "import": "exchange", "run": "run"},
}
"""The commands that `kvprof --help` lists, by panel and in order, each with the module here that has its function."""

UNLISTED = {
    "calibrate": "audit",
    "diff": "explain",
    "generate": "generate",
    "merge": "merge",
    "plot": "plot",
    "schema": "show",
    "targets": "exchange",
    "validate": "show",
}
"""The commands that the last line of `kvprof --help` only names, likewise."""

COMMANDS = {name: module for commands in (*PANELS.values(), UNLISTED) for name, module in commands.items()}
"""All commands, listed or not, likewise."""

QUICK = frozenset({"allocate", "explain", "diff", "show", "schema", "merge", "targets", "export"})
"""Commands that read a file or two, write one and end."""


def make_app(names: Iterable[str] = COMMANDS, with_options: bool = True) -> typer.Typer:
    """Return the app with these commands. Making all of them would take a good part of a short command's time.

    with_options: without them, a command is good for its line in the list of commands alone.
    """
    made = typer.Typer(
        name="kvprof",
        cls=Group,
        epilog=f"More: {', '.join(UNLISTED)}.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_main)
    panels = {name: panel for panel, commands in PANELS.items() for name in commands}
    for name in names:
        module = import_module(f"kvprof.cli.{COMMANDS[name]}")
        function = getattr(module, name, None) or getattr(module, f"{name}_")  # no function can be called `import`
        made.command(
            name,
            cls=module.TakesSeveralFiles if name == "evaluate" else Command,
            help=unwrapped(function.__doc__),
            rich_help_panel=panels.get(name),
            hidden=name not in panels,
        )(explains_errors(speaks(function)) if with_options else _listed)
    return made


def app_for(words: list[str]) -> typer.Typer:
    """Return the app that serves a command line: one command where it begins with one, else all of them."""
    if words[:1] in ([], ["-h"], ["--help"]) and "_KVPROF_COMPLETE" not in os.environ:
        return make_app(with_options=False)
    return make_app(words[:1] if words and words[0] in COMMANDS else COMMANDS)


def _listed() -> None:
    """Stand for a command in the list of commands."""


def _version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import version

    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else f"CPU, {torch.get_num_threads()} threads"
    typer.echo(f"kvprof {__version__}")
    typer.echo(f"torch {torch.__version__}")
    typer.echo(f"transformers {version('transformers')}")
    typer.echo(f"device {device}")
    raise typer.Exit


def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the versions, and the device.",
        ),
    ] = False,
) -> None:
    """Measure, plan and check the bits of a language model's KV cache."""


def __getattr__(name: str) -> Any:
    """Make `app`, with all commands, when it is first asked for."""
    if name != "app":
        raise AttributeError(f"module 'kvprof.cli.app' has no attribute {name!r}")
    app = globals()["app"] = make_app()
    return app
