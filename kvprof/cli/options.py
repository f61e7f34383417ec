"""The options that several commands have, each worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PlannedModel = Annotated[
    str | None,
    typer.Option(
        help="A hub id, a folder, a .gguf file, or `demo`.", show_default="the plan's own; else the demo model"
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the result.", show_default="outputs/<model>")]
TEXTS = (
    "Text: `builtin`, `self` (the model's own), a file (.txt, .jsonl, .parquet, .csv, ..., .gz), a folder or a pattern "
    "of files, a hub dataset; NAME:2 takes twice as much. Can be repeated."
)
Texts = Annotated[list[str] | None, typer.Option("--data", help=TEXTS, show_default="builtin and self")]
HeldOutTexts = Annotated[list[str] | None, typer.Option("--data", help=TEXTS, show_default="builtin")]
SPLITS = "`calibration` or `held-out` (three rows to one, by hash), `all`; of a hub dataset, its own."
Split = Annotated[str | None, typer.Option(help=SPLITS, show_default="calibration; all of a file; train of a dataset")]
HeldOutSplit = Annotated[
    str | None, typer.Option("--split", help=SPLITS, show_default="held-out; all of a file; train of a dataset")
]
Column = Annotated[
    str | None,
    typer.Option(
        help="Column of the rows to read: text or messages; or a template, '{question}\\n{answer}'.",
        show_default="found by names",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(help="Configuration of the hub dataset; also org/name/CONFIG.", show_default="the only one"),
]
SequenceLength = Annotated[
    int | None, typer.Option(help="Tokens a sequence has at most.", show_default="512, or the model's own limit")
]
CalibrationLength = Annotated[
    int | None,
    typer.Option(
        "--sequence-length", help="Tokens a sequence has at most.", show_default="1024, or the model's own limit"
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Which rows of the text are taken, and in what order.")]
Pack = Annotated[bool, typer.Option("--pack", help="Join rows and cut windows of the full length.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]
Device = Annotated[
    str,
    typer.Option(help="auto (the GPU; layers spread over all where one is too small; else the CPU), cpu, cuda:1."),
]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="Load one block at a time from the checkpoint: for models larger than the memory."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let Python code run that comes with the model, where transformers has none for it. Its files are named.",
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="Whose tokenizer to take: a hub id, a folder or a .gguf file. For weights that were saved without one.",
        show_default="the model's own",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what it would take in tokens, memory, time and disk, and stop there.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew instead of resuming a stopped run.")]
GroupSize = Annotated[
    int, typer.Option(min=1, max=2**31, help="Elements that share a scale: tokens for keys, channels for values.")
]
RecentTokens = Annotated[int, typer.Option(min=0, max=2**31, help="Last tokens kept in full precision.")]
SinkTokens = Annotated[int, typer.Option(min=0, max=2**31, help="First tokens kept in full precision.")]
SuffixFraction = Annotated[
    float, typer.Option(min=0.01, max=1, help="Share of each sequence, at its end, whose predictions count.")
]
