"""The options of what a plan may choose from, shared by `allocate` and `frontier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.options import RECENT_TOKENS, SINK_TOKENS, within
from kvprof.records.requests.option import FORMATS, WINDOW

ScoresFile = Annotated[
    Path | None, typer.Option(help="Scores file.", show_default="the newest in outputs/ that has the metric")
]
Bits = Annotated[
    str | None,
    typer.Option(
        help="Code widths to choose from, such as 2,3,4,8; of 1,2,3,4,5,6,8,16.",
        show_default="all scored; for a norm 1,2,3,4,6,8",
        rich_help_panel=FORMATS,
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        help="Scored formats to choose from: int3g64,rot2 or key:int2g64c,value:rot2; `full` is 16 bits.",
        show_default="all scored",
        rich_help_panel=FORMATS,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        callback=within(1, 2**31),
        help="Elements that share a scale: tokens for keys, channels for values. Rotated formats have no groups.",
        show_default="all scored; for a norm 32",
        rich_help_panel=FORMATS,
    ),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(
        help="Fix the bits or format of a tensor: key:0=8, value:3-5=rot2, key:*=int4g64. Can be repeated.",
        show_default=False,
        rich_help_panel=FORMATS,
    ),
]
Tie = Annotated[
    str | None,
    typer.Option(
        help="`key-value`: codes of equal width for the keys and values of a layer.",
        show_default="none",
        rich_help_panel=FORMATS,
    ),
]
MinKeyBits = Annotated[
    int | None,
    typer.Option(min=1, max=16, help="Least code width of a key.", show_default="none", rich_help_panel=FORMATS),
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Sliding-window layers: `all` quantizes them too, `full` keeps them in 16 bits.",
        show_default="all, where that saves memory",
        rich_help_panel=WINDOW,
    ),
]
WINDOW_DEFAULT = "as the scores were measured; else {}"
RecentTokens = Annotated[
    int | None,
    typer.Option(
        callback=within(0, 2**31),
        help=RECENT_TOKENS,
        show_default=WINDOW_DEFAULT.format(128),
        rich_help_panel=WINDOW,
    ),
]
SinkTokens = Annotated[
    int | None,
    typer.Option(
        callback=within(0, 2**31), help=SINK_TOKENS, show_default=WINDOW_DEFAULT.format(4), rich_help_panel=WINDOW
    ),
]
