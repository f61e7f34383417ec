"""The command `run`: a recipe, step by step."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli.completion import recipes
from kvprof.cli.options import TokenizerName, TrustRemoteCode
from kvprof.cli.stops import STOPPED
from kvprof.errors import InvalidFile, UsageError
from kvprof.records.requests.option import OUTPUT

if TYPE_CHECKING:
    from kvprof.recipes.done import Past
    from kvprof.recipes.steps import Step
    from kvprof.records.replies import RecipeStep


def run(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Recipe that comes with kvprof, such as `quickstart`, or a .toml file.",
            show_default="list them",
            autocompletion=recipes,
        ),
    ] = None,
    lists: Annotated[bool, typer.Option("--list", help="List the recipes that come with kvprof.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder, .gguf file, or `demo`.", show_default="the recipe's"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="the recipe's; else outputs/<model>"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, and which would be skipped; run nothing.")
    ] = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Run every step again from its beginning.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Run a recipe: measure, plan, evaluate and report.

    Steps that are done are skipped, and an interrupted run is resumed. A step is done again when a file that it reads
    or wrote, its settings, the model or kvprof changed.
    """
    from kvprof.recipes.done import Past
    from kvprof.recipes.shipped import find_recipe
    from kvprof.recipes.steps import steps_of
    from kvprof.recipes.words import own_place
    from kvprof.records.recipe import read_recipe
    from kvprof.records.replies import RecipeRun
    from kvprof.report.console import print_note, print_result
    from kvprof.report.runs import show_planned, show_run

    if recipe is None or lists:
        if lists and recipe is not None:
            raise UsageError(f"--list lists all recipes; leave it out, or {recipe}.")
        if model is not None or out is not None or dry_run or restart:
            raise UsageError("name a recipe, such as quickstart.\n  `kvprof run --list` lists them.")
        _list_recipes()
        return
    path = find_recipe(recipe)
    found = read_recipe(path)
    home = path.absolute().parent

    from kvprof.models.load import resolve
    from kvprof.models.names import DEMO
    from kvprof.storage.folders import OUTPUTS, output_folder, slug

    named = _named_model(found.model, home) if model is None else _named_model(model, Path.cwd())
    # The demo model may have to be converted first.
    source = None if dry_run and named == DEMO else resolve(str(named), trust_remote_code, tokenizer)
    id_ = DEMO if source is None else source.id
    try:
        folder = out or (own_place(found.out, home) if found.out else OUTPUTS / slug(id_))
        steps = steps_of(found, named, folder, home)
    except InvalidFile as error:
        raise InvalidFile(f"{path}: {error}") from None
    if trust_remote_code:  # said here alone: a recipe may be a stranger's
        steps = [step.trusting() for step in steps]
    if tokenizer is not None:
        steps = [step.reading_with(tokenizer) for step in steps]
    past = Past(folder, restart)
    if past.remark is not None:
        print_note(past.remark)
    if dry_run:
        if not past.knows_nothing:
            _read_model(past, str(named))
        verdicts = zip(steps, past.verdicts(steps), strict=True)
        taken = [_answer(step, past, verdict.status, verdict.reason) for step, verdict in verdicts]
    else:
        output_folder(id_, folder)
        with past:
            _read_model(past, str(named))
            taken = [_take(steps, number, past) for number in range(len(steps))]
    answer = RecipeRun(recipe=str(path), model=id_, folder=str(folder), steps=tuple(taken))
    (show_planned if dry_run else show_run)(answer)
    print_result(answer)


def _take(steps: Sequence[Step], number: int, past: Past) -> RecipeStep:
    """Run a step or skip it; exit with the code of its command if that fails."""
    from kvprof.report.console import print_note, print_plain
    from kvprof.report.runs import show_step
    from kvprof.storage.journal import Journal

    step, later = steps[number], steps[number + 1 :]
    show_step(number + 1, len(steps), step.line)
    verdict = past.verdict(step, later)
    if verdict.status == "skipped":
        print_plain(f"skipped: {verdict.reason}\n")
        return _answer(step, past, "skipped", verdict.reason)
    if past.begin(step, later) and step.journal.exists():
        with Journal(step.journal, {}, restart=True) as journal:  # of other settings: nothing to go on with
            journal.remove()
    start = time.monotonic()
    code = _run_command(step.arguments)
    if code != 0:
        if code not in STOPPED:
            print_note(
                f"step {number + 1} of {len(steps)} failed: {step.line}\n"
                "  What was done stays done. Put right what it says, and give the same command again to go on: "
                f"{shlex.join(['kvprof', *sys.argv[1:]])}"
            )
        raise typer.Exit(code)
    past.end(step)
    print_plain("")
    return _answer(step, past, "done", verdict.reason, time.monotonic() - start)


def _run_command(arguments: list[str]) -> int:
    """Run another command in this process, as if it had been typed; return its exit code."""
    from kvprof.cli.app import make_app

    with _typed(arguments):
        try:
            make_app(arguments[:1])(arguments, prog_name="kvprof")
        except SystemExit as exited:
            return exited.code if isinstance(exited.code, int) else int(exited.code is not None)
    return 0


@contextlib.contextmanager
def _typed(arguments: list[str]) -> Iterator[None]:
    """Set sys.argv to a step's command, which plans record in their provenance."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _named_model(model: str, home: Path) -> str | Path:
    """Return the model as a path where the recipe means one, relative to `home`; else as it is named."""
    from kvprof.models.names import DEMO
    from kvprof.recipes.words import place_of

    name = os.path.expanduser(model)
    if os.path.exists(home / name) and model != DEMO:
        place = place_of(model, home)
        return place if str(place) != DEMO else place.absolute()  # a folder of that name, and not the demo model
    return Path(os.path.abspath(home / name)) if name.startswith((".", "/")) else model


def _read_model(past: Past, model: str) -> None:
    from kvprof.models.load import resolve

    source = resolve(model)
    past.read_model(source.path or f"{source.hub_id}@{source.fetch(weights=False).name}")


def _answer(step: Step, past: Past, status: str, reason: str, seconds: float | None = None) -> RecipeStep:
    from kvprof.records.replies import RecipeStep

    return RecipeStep.model_validate(
        {
            "command": step.line,
            "status": status,
            "reason": reason,
            "seconds": seconds,
            "outputs": tuple(str(path) for path in past.written(step)),
        }
    )


def _list_recipes() -> None:
    from kvprof.recipes.shipped import shipped_recipes
    from kvprof.records.recipe import read_recipe
    from kvprof.records.replies import ShippedRecipe, ShippedRecipes
    from kvprof.report.console import print_result
    from kvprof.report.runs import show_recipes

    shipped = ShippedRecipes(
        recipes=tuple(
            ShippedRecipe(name=name, description=read_recipe(path).description, path=str(path))
            for name, path in shipped_recipes().items()
        )
    )
    show_recipes(shipped)
    print_result(shipped)
