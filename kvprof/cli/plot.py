"""The command `plot`: pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli.request import asks

if TYPE_CHECKING:
    from kvprof.records.requests.share import PlotRequest

Pictures = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PICTURE",
        help="norms, spectra, gradients, losses, plan, frontier, positions, audit, benchmark; or a file to draw, such "
        "as outputs/demo/plan-2.50.json.",
        show_default="all whose files exist",
    ),
]


@asks("share.PlotRequest")
def plot(
    pictures: Pictures = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose files to draw: hub id, folder, .gguf file, or `demo`; or the folder of the files.",
            show_default="the newest in outputs/",
        ),
    ] = None,
    *,
    request: PlotRequest,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the pictures, or a file that ends in .png or .svg.", show_default="outputs/<model>/plots"
        ),
    ] = None,
) -> None:
    """Draw measurements and plans as pictures for a paper."""
    from kvprof.records.replies import Written
    from kvprof.report.console import print_note, print_result, print_written
    from kvprof.report.plots.drawing import draw_pictures

    written, remarks = draw_pictures(request, pictures or (), model, out)
    for remark in remarks:
        print_note(remark)
    for path in written:
        print_written(path)
    print_result(Written(paths=tuple(map(str, written))))
