"""The Typer app: every command by name. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from kvprof import __version__
from kvprof.cli import allocate, audit, evaluate, exchange, explain, frontier, generate, measure, show
from kvprof.cli.errors import explains_errors

app = typer.Typer(
    name="kvprof",
    help="Which bits does a language model's KV cache need? Measure, allocate, obey.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvprof {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Which bits does a language model's KV cache need? Measure, allocate, obey."""


for _command in (
    measure.inspect,
    measure.norms,
    measure.gradients,
    allocate.allocate,
    frontier.frontier,
    explain.explain,
    explain.diff,
    evaluate.evaluate,
    audit.divergence,
    audit.calibrate,
    audit.audit,
    generate.generate,
    show.show,
    show.validate,
    show.schema,
):
    several = _command is evaluate.evaluate
    app.command(cls=evaluate.TakesSeveralFiles if several else None)(explains_errors(_command))

app.command("import")(explains_errors(exchange.import_))  # a function cannot have the name
