"""The command `allocate`: from a budget and Scores to a plan file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli.request import asks

if TYPE_CHECKING:
    from kvprof.records.requests.plan import AllocateRequest


@asks("plan.AllocateRequest")
def allocate(
    request: AllocateRequest,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the plan, or a file that ends in .json.", show_default="outputs/<model>"),
    ] = None,
) -> None:
    """Choose the format of every tensor within a budget; write a plan.

    The plan is the one of least predicted loss within --budget, --memory or --max-kl. Reads a Scores file, never a
    model.
    """
    # For arrays as small as these, starting numpy's pool of threads would cost more than all of the arithmetic.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from kvprof.api.plan import plan_as_asked, uncertainty_as_asked, unrestricted_as_asked
    from kvprof.cli.typed import typed_command
    from kvprof.report.console import print_note, print_plain, print_result, print_written
    from kvprof.report.plans import (
        bytes_line,
        plan_remarks,
        prediction_lines,
        restriction_lines,
        show_plan,
        stability_lines,
    )

    made = plan_as_asked(request, None, typed_command("allocate", {**request.said(), "out": out}))
    plan, found, path = made
    free = unrestricted_as_asked(request, made)
    written = made.save(out, request)
    show_plan(plan)
    if request.context is not None:
        print_plain(bytes_line(plan, request))
    print_plain(f"from {path}")
    for line in [] if free is None else restriction_lines(plan, free):
        print_plain(line)
    uncertainty = uncertainty_as_asked(request, made)
    for line in (*prediction_lines(plan, found, uncertainty.best_pair), *stability_lines(uncertainty.stability)):
        print_plain(line)
    for remark in (*plan_remarks(plan, found), *uncertainty.remarks):
        print_note(remark)
    print_written(written)
    print_result(plan)
