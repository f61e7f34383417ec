"""The command `report`: all results of a model on one page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.errors import InvalidFile, KvprofError, did_you_mean, first_line

if TYPE_CHECKING:
    from kvprof.records.inventory import Inventory

Model = Annotated[
    str | None,
    typer.Argument(
        help="Hub id, folder, .gguf file, or `demo`; or the folder of its results.",
        show_default="the newest in outputs/",
    ),
]


def report(
    model: Model = None,
    plan: Annotated[Path | None, typer.Option(help="Plan to show.", show_default="the newest of the model")] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="Scores to show. Can be repeated.", show_default="the plan's; else the newest of the model"),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Evaluation to show.", show_default="the plan's; else the newest of the model"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the page, or a file that ends in .html. A folder that holds results is also where they "
            "are read.",
            show_default="outputs/<model>",
        ),
    ] = None,
) -> None:
    """Write one page of all results of a model, as HTML and Markdown.

    The page holds every picture and needs no network. A section without results names the command that makes them.
    Loads no weights, and never asks the hub.
    """
    from kvprof.records.replies import Written
    from kvprof.report.console import print_note, print_plain, print_result, print_written
    from kvprof.report.html import to_html
    from kvprof.report.markdown import to_markdown
    from kvprof.report.whole import absent, make_page
    from kvprof.storage.atomic import write_atomically
    from kvprof.workspace.report_inputs import folder_of, gather, holds_files

    named = [path for path in (plan, *(scores or ()), evaluation) if path is not None]
    folder = out if out is not None and holds_files(out) else folder_of(model, named)
    if model is None and not holds_files(folder) and not named:  # nothing but a report, where there is a folder
        model = "demo"
    if model is None or (model != "demo" and holds_files(Path(os.path.expanduser(model)))):
        files = gather(folder, named)
        files = files.with_inventory(_inventory(files.model.id))
    else:
        inventory = _inventory(model)
        if inventory is None and not folder.is_dir() and not named:
            known = {"demo": None} | {path.name: None for path in sorted(folder.parent.glob("*")) if path.is_dir()}
            raise InvalidFile(
                f"nothing is known of {model!r}: there is no {folder}/, and its config is not on this machine; "
                f"{did_you_mean(model, known)}\n  Measure it first: kvprof norms {model}"
            )
        files = gather(folder, named, inventory)
    page = make_page(files)
    place = out if out is not None and out.suffix == ".html" else (out or folder) / "report.html"
    written = [
        write_atomically(place, to_html(page)),
        write_atomically(place.with_suffix(".md"), to_markdown(page)),
    ]
    for name, fact in page.facts:
        print_plain(f"{name}: {fact}")
    for remark in page.remarks:
        print_note(remark)
    commands = absent(files)
    if commands:
        print_note(f"not in it, since it was not measured: {', '.join(commands)}")
    for path in written:
        print_written(path)
    print_result(Written(paths=tuple(str(path).encode(errors="replace").decode() for path in written)))


def _inventory(model: str | None) -> Inventory | None:
    """Return what a model's config says; None where it is not on this machine, or with a remark cannot be read."""
    from kvprof.models.offline import inventory_at_hand
    from kvprof.report.console import print_note

    if model is None:
        return None
    try:
        return inventory_at_hand(model)
    except KvprofError as error:
        print_note(f"the model's config was not read: {first_line(error)}")
        return None
