"""The command `frontier`: the best plan of every budget."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.allowed import (
    Bits,
    Formats,
    GroupSize,
    Layers,
    MinKeyBits,
    Pin,
    RecentTokens,
    ScoresFile,
    SinkTokens,
    Tie,
)
from kvprof.records.requests.option import BUDGET


def frontier(
    low: Annotated[
        str | None,
        typer.Option("--from", help="Smallest budget, in bits per element.", show_default="the cheapest plan's"),
    ] = None,
    high: Annotated[
        str | None, typer.Option("--to", help="Largest budget.", show_default="the most expensive plan's")
    ] = None,
    points: Annotated[
        int | None,
        typer.Option(
            min=2, max=1000, help="Number of budgets, evenly spaced.", show_default="round ones, at most about 200"
        ),
    ] = None,
    scores: ScoresFile = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the frontier, or a file that ends in .json.", show_default="outputs/<model>"),
    ] = None,
    unit: Annotated[
        str,
        typer.Option(
            help="What a budget counts: `stored` bits (codes and scales) or `nominal` bits (codes alone).",
            rich_help_panel=BUDGET,
        ),
    ] = "stored",
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per sequence at which to count each plan's bytes as well.",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences at which to count them.", show_default="1", rich_help_panel=BUDGET),
    ] = None,
    bits: Bits = None,
    formats: Formats = None,
    group_size: GroupSize = None,
    pin: Pin = None,
    tie: Tie = None,
    min_key_bits: MinKeyBits = None,
    layers: Layers = None,
    recent_tokens: RecentTokens = None,
    sink_tokens: SinkTokens = None,
) -> None:
    """Compute the best plan of every budget and its predicted KL.

    Marks the knees, the budgets above which more bits buy less, and draws a picture. Reads a Scores file, never a
    model.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as for allocate: threads cost more than the arithmetic

    from kvprof.allocate.frontier import frontier as find_frontier
    from kvprof.allocate.task import usual_window
    from kvprof.records.formats import parse_bits
    from kvprof.records.scores import LOSS_INCREASE, Scores
    from kvprof.report.console import print_note, print_plain, print_result, print_written
    from kvprof.report.frontiers import show_frontier
    from kvprof.report.plans import loss_remarks
    from kvprof.report.plots.frontier import frontier_figure
    from kvprof.report.plots.style import MissingMatplotlib, NothingToDraw, save_figure
    from kvprof.workspace.discovery import newest_scores
    from kvprof.workspace.names import frontier_path

    path, found = newest_scores(LOSS_INCREASE) if scores is None else (scores, Scores.load(scores))
    window = usual_window(found, sink_tokens, recent_tokens)
    result = find_frontier(
        found,
        low=low,
        high=high,
        points=points,
        unit=unit,
        context=context,
        batch=batch,
        layers=layers,
        tie=tie,
        window=window,
        command=shlex.join(["kvprof", *sys.argv[1:]]),
        bits=None if bits is None else parse_bits(bits),
        formats=formats,
        group_size=group_size,
        min_key_bits=min_key_bits,
        pins=pin or (),
    )
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
