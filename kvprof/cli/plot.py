"""The command `plot`: pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprof.records.requests.option import OUTPUT

Pictures = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PICTURE",
        help="norms, spectra, gradients, losses, plan, frontier, positions, audit, benchmark; or a file to draw, such "
        "as outputs/demo/plan-2.50.json.",
        show_default="all whose files exist",
    ),
]


def plot(
    pictures: Pictures = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose files to draw: hub id, folder, .gguf file, or `demo`; or the folder of the files.",
            show_default="the newest in outputs/",
        ),
    ] = None,
    kind: Annotated[str | None, typer.Option("--format", help="`png` or `svg`.", show_default="png")] = None,
    width: Annotated[
        float | None,
        typer.Option(
            min=3,
            max=40,
            help="Inches: 3.3 is one column of a paper, 7 both.",
            show_default="what suits the picture",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to draw `spectra` of, such as 0-3,7.", show_default="a dozen, evenly spaced"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the pictures, or a file that ends in .png or .svg.", show_default="outputs/<model>/plots"
        ),
    ] = None,
    dpi: Annotated[
        int | None,
        typer.Option(min=50, max=1200, help="Pixels per inch of a PNG.", show_default="200", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Draw measurements and plans as pictures for a paper."""
    from kvprof.records.replies import Written
    from kvprof.report.console import print_note, print_result, print_written
    from kvprof.report.plots.drawing import Order, draw_pictures

    written, remarks = draw_pictures(Order(pictures or (), model, kind, out, width, dpi, layers))
    for remark in remarks:
        print_note(remark)
    for path in written:
        print_written(path)
    print_result(Written(paths=tuple(map(str, written))))
