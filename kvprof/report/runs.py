"""What became of a recipe's steps, and the recipes that there are, as tables."""

from __future__ import annotations

from pathlib import Path

from kvprof.records.replies import RecipeRun, ShippedRecipes
from kvprof.report.console import Table, print_plain


def show_step(number: int, count: int, line: str) -> None:
    """Print the heading above a step's own output."""
    print_plain(f"[{number}/{count}] {line}", style="bold")


def show_planned(run: RecipeRun) -> None:
    """Print every step's command line, and whether it would be skipped."""
    for number, step in enumerate(run.steps, start=1):
        show_step(number, len(run.steps), step.command)
        print_plain(f"    {step.status}: {step.reason}")
    skipped = sum(step.status == "skipped" for step in run.steps)
    print_plain(f"{len(run.steps)} steps into {run.folder}, {skipped} of them skipped")


def show_run(run: RecipeRun) -> None:
    """Print what was done, what was skipped, and how long it took."""
    table = Table(
        f"recipe {Path(run.recipe).stem} on {run.model}", ("step", "command", "", "time", "output"), left=(1, 2, 4)
    )
    for number, step in enumerate(run.steps, start=1):
        command = step.command.split()[1]
        took = "" if step.seconds is None else _clock(step.seconds)
        table.add(str(number), command, step.status, took, *step.outputs[:1])
    table.print()


def show_recipes(shipped: ShippedRecipes) -> None:
    """Print the recipes that come with kvprof, a line each."""
    width = max(len(recipe.name) for recipe in shipped.recipes)
    for recipe in shipped.recipes:
        print_plain(f"{recipe.name.ljust(width)}  {recipe.description}")


def _clock(seconds: float) -> str:
    """Return a time in the two units that matter: 3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
