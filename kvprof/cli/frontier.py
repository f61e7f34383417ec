"""The command `frontier`: the best plan of every budget."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli.request import asks

if TYPE_CHECKING:
    from kvprof.records.requests.plan import FrontierRequest


@asks("plan.FrontierRequest")
def frontier(
    request: FrontierRequest,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the frontier, or a file that ends in .json.", show_default="outputs/<model>"),
    ] = None,
) -> None:
    """Compute the best plan of every budget and its predicted KL.

    Marks the knees, the budgets above which more bits buy less, and draws a picture. Reads a Scores file, never a
    model.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as for allocate: threads cost more than the arithmetic

    from kvprof.api.plan import frontier_as_asked
    from kvprof.report.console import print_note, print_plain, print_result, print_written
    from kvprof.report.frontiers import show_frontier
    from kvprof.report.plans import loss_remarks
    from kvprof.report.plots.frontier import frontier_figure
    from kvprof.report.plots.style import MissingMatplotlib, NothingToDraw, save_figure
    from kvprof.workspace.names import frontier_path

    result, found, path = frontier_as_asked(request, shlex.join(["kvprof", *sys.argv[1:]]))
    written = result.save(frontier_path(found, path, out))
    show_frontier(result)
    print_plain(f"from {path}")
    for remark in loss_remarks(found, result.window):
        print_note(remark)
    print_written(written)
    try:
        print_written(save_figure(frontier_figure(result), written.parent / "plots" / f"{written.stem}.png"))
    except (MissingMatplotlib, NothingToDraw) as error:
        print_note(f"no picture: {error}")
    print_result(result)
