"""Options that several commands have and no request holds: which model, where results go, how a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprof.records.requests.option import DEVICE, OUTPUT

MODEL = "Hub id, folder, .gguf file, or `demo`."
PLANS_MODEL = "the plan's model; if it names none, the demo model"
Model = Annotated[str | None, typer.Argument(help=MODEL, show_default="the demo model")]
PlannedModel = Annotated[str | None, typer.Option(help=MODEL, show_default=PLANS_MODEL)]
PlannedModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL, show_default=PLANS_MODEL)]
PlanScores = Annotated[
    Path | None,
    typer.Option(
        help="Scores file that the plan was made from.",
        show_default="found by its digest beside the plan or in outputs/",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the result.", show_default="outputs/<model>")]
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
