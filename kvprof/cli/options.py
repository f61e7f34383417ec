"""The options that several commands have, each worded once, and the panels of the help that options stand in.

What is in no panel comes first in a command's help, under "Options": at most the five that most users need.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kvprof.records.requests.option import DEVICE, FORMATS, MEASUREMENT, OUTPUT, TEXT, WINDOW


def within(low: int, high: int) -> Callable[[int | None], int | None]:
    """Return an option's check that its number lies in a range, as Typer's `min` and `max` do.

    Those print the range beside the option, too, which tells a reader nothing where the bound is 2**31.
    """

    def check(value: int | None) -> int | None:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"{value} is not between {low} and {high}.")
        return value

    return check


PlannedModel = Annotated[
    str | None,
    typer.Option(
        help="Hub id, folder, .gguf file, or `demo`.", show_default="the plan's model; if it names none, the demo model"
    ),
]
PlanScores = Annotated[
    Path | None,
    typer.Option(
        help="Scores file that the plan was made from.",
        show_default="found by its digest beside the plan or in outputs/",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the result.", show_default="outputs/<model>")]
TEXTS = (
    "Text: `builtin`, `self` (written by the model), a file (.txt, .jsonl, .parquet, .csv, ..., .gz), a folder or "
    "pattern of files, or a hub dataset. NAME:2 takes twice as much of it. Can be repeated."
)
Texts = Annotated[list[str] | None, typer.Option("--data", help=TEXTS, show_default="builtin and self")]
HeldOutTexts = Annotated[list[str] | None, typer.Option("--data", help=TEXTS, show_default="builtin")]
SPLITS = "`calibration` or `held-out` (3 in 4 rows and 1 in 4, by hash), `all`, or a split of the hub dataset."
Split = Annotated[
    str | None,
    typer.Option(help=SPLITS, show_default="calibration; all of a file; train of a dataset", rich_help_panel=TEXT),
]
HeldOutSplit = Annotated[
    str | None,
    typer.Option(
        "--split", help=SPLITS, show_default="held-out; all of a file; train of a dataset", rich_help_panel=TEXT
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        help="Column to read, of text or of messages; or a template such as '{question}\\n{answer}'.",
        show_default="found by name",
        rich_help_panel=TEXT,
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        help="Configuration of the hub dataset; org/name/CONFIG names it too.",
        show_default="the only one",
        rich_help_panel=TEXT,
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        help="Largest length of a sequence, in tokens.",
        show_default="512, or the model's limit",
        rich_help_panel=TEXT,
    ),
]
CalibrationLength = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        help="Largest length of a sequence, in tokens.",
        show_default="1024, or the model's limit",
        rich_help_panel=TEXT,
    ),
]
Seed = Annotated[
    int,
    typer.Option(callback=within(0, 2**32 - 1), help="Seed of the choice and order of the rows.", rich_help_panel=TEXT),
]
Pack = Annotated[
    bool, typer.Option("--pack", help="Join rows and cut sequences of the full length.", rich_help_panel=TEXT)
]
Dtype = Annotated[
    str,
    typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.", rich_help_panel=DEVICE),
]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda:1, or auto: the GPU, all GPUs if one is too small, or the CPU.", rich_help_panel=DEVICE
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Load one block at a time from the checkpoint, for models larger than the memory.",
        rich_help_panel=DEVICE,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that comes with the model if transformers has none for it; its files are named.",
        rich_help_panel=DEVICE,
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="Tokenizer, for weights saved without one: hub id, folder or .gguf file.",
        show_default="the model's",
        rich_help_panel=DEVICE,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print an estimate of tokens, memory, time and disk; measure nothing.")
]
Restart = Annotated[
    bool,
    typer.Option("--restart", help="Start again instead of resuming an interrupted run.", rich_help_panel=OUTPUT),
]
GroupSize = Annotated[
    int,
    typer.Option(
        callback=within(1, 2**31),
        help="Elements that share a scale: tokens for keys, channels for values.",
        rich_help_panel=FORMATS,
    ),
]
RECENT_TOKENS = "Last tokens, kept in full precision."
SINK_TOKENS = "First tokens, kept in full precision."
RecentTokens = Annotated[int, typer.Option(callback=within(0, 2**31), help=RECENT_TOKENS, rich_help_panel=WINDOW)]
SinkTokens = Annotated[int, typer.Option(callback=within(0, 2**31), help=SINK_TOKENS, rich_help_panel=WINDOW)]
SuffixFraction = Annotated[
    float,
    typer.Option(
        min=0.01,
        max=1,
        help="Share of each sequence, at its end, whose predictions are measured.",
        rich_help_panel=MEASUREMENT,
    ),
]
