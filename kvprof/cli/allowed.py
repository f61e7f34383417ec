"""The options that say what a plan may choose from, which `allocate` and `frontier` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ScoresFile = Annotated[
    Path | None, typer.Option(help="A Scores file.", show_default="the newest in outputs/ that has the metric")
]
Bits = Annotated[
    str | None,
    typer.Option(
        help="Widths of codes to choose from, of 1,2,3,4,5,6,8,16.", show_default="all scored; by a norm 1,2,3,4,6,8"
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        help="Scored formats to choose from: int3g64,rot2, or key:int2g64c,value:rot2. `full` is 16 bits.",
        show_default="all that were scored",
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=2**31,
        help="Elements that share a scale: tokens for keys, channels for values. Rotated formats have none.",
        show_default="all scored; by a norm 32",
    ),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(
        help="Fix a tensor's bits or format: key:0=8, value:3-5=rot2, key:*=int4g64. Can be repeated.",
        show_default=False,
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Layers of a sliding window: `all` quantizes them too, `full` leaves them in 16 bits.",
        show_default="all, where that saves memory",
    ),
]
Tie = Annotated[
    str | None,
    typer.Option(help="`key-value`: codes of equal width for a layer's keys and values.", show_default="none"),
]
MinKeyBits = Annotated[
    int | None, typer.Option(min=1, max=16, help="Bits of code that every key has at least.", show_default="none")
]
WINDOW_DEFAULT = "as the scores were measured, else {}"
SinkTokens = Annotated[
    int | None,
    typer.Option(min=0, max=2**31, help="First tokens kept in full precision.", show_default=WINDOW_DEFAULT.format(4)),
]
RecentTokens = Annotated[
    int | None,
    typer.Option(min=0, max=2**31, help="Last tokens kept in full precision.", show_default=WINDOW_DEFAULT.format(128)),
]
