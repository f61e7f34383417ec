"""The command `verify`: a plan checked against everything it was made from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.options import PlanScores, TokenizerName, TrustRemoteCode


def verify(
    plan: Annotated[Path, typer.Argument(help="BitPlan file.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model of the plan: hub id, folder, .gguf file, or `demo`. Reads its weights and the calibration "
            "text again.",
            show_default="not read",
        ),
    ] = None,
    scores: PlanScores = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure the scores again and plan from them. Needs --model."),
    ] = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check a plan against the scores, text and model it names.

    Computes the plan's numbers again. Exits with 4 if one of them differs.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of so little arithmetic, starting threads is the most

    from kvprof.api.verify import verify as verify_plan
    from kvprof.errors import Mismatch
    from kvprof.report.console import print_result, progress
    from kvprof.report.verified import show_verified

    with progress("measuring", "sequences") as advance:
        verified = verify_plan(plan, model, scores, measure, advance, trust_remote_code, tokenizer)
    show_verified(verified)
    print_result(verified)
    if verified.differing:
        raise Mismatch(
            f"{plan} is not what it was made from: {len(verified.differing)} of {len(verified.checks)} checks differ.\n"
            "  Plan anew with kvprof allocate, or name the files that belong to it with --scores and --model."
        )
