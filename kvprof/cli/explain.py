"""The commands `explain` and `diff`: reasons for a plan's bits, and differences of two plans. They read files only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli import completion
from kvprof.cli.options import PlanScores


def explain(
    plan: Annotated[Path, typer.Argument(help="BitPlan file.")],
    layer: Annotated[
        list[str], typer.Option(help="Layer or range, such as 7 or 3-5. Can be repeated.", show_default=False)
    ],
    tensor: Annotated[
        str | None, typer.Option(help="`key` or `value` alone; for latents `latent` or `rope`.", show_default="both")
    ] = None,
    scores: PlanScores = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Score to explain with: loss_increase, gradient_norm, spectral_norm or frobenius_norm.",
            show_default="the plan's",
            autocompletion=completion.metrics,
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            help="Formats that compete for the budget: int3g64,rot2 or key:int2g64c,value:rot2.",
            show_default="all scored",
        ),
    ] = None,
) -> None:
    """Explain why a layer got its bits.

    Lists what each format of its keys and values costs in bits and in loss, beside the price of a bit in the whole
    plan. Reads files, never a model.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of so little arithmetic, starting threads is the most

    from kvprof.analysis.explain import explain as explain_plan
    from kvprof.records.plan import BitPlan
    from kvprof.records.scores import Scores
    from kvprof.report.console import print_result
    from kvprof.report.explanations import show_explanation
    from kvprof.workspace.scores_of_plans import find_scores

    read = BitPlan.load(plan)
    path, found = find_scores(read, plan) if scores is None else (scores, Scores.load(scores))
    explanation = explain_plan(
        read, found, layer, tensor=tensor, metric=metric, formats=formats, names=(str(plan), str(path))
    )
    show_explanation(explanation)
    print_result(explanation)


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="BitPlan file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="BitPlan file for the same model.")],
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Scores file to predict the KL of both plans with.",
            show_default="the one both were made from; else what each plan says",
        ),
    ] = None,
) -> None:
    """Compare two plans: formats, bytes and predicted KL.

    Lists the tensors that plan B stores differently from plan A. Reads files, never a model.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from kvprof.analysis.diff import compare
    from kvprof.records.plan import BitPlan
    from kvprof.records.scores import Scores
    from kvprof.report.comparisons import show_comparison
    from kvprof.report.console import print_result
    from kvprof.workspace.scores_of_plans import find_common_losses

    before, after = BitPlan.load(first), BitPlan.load(second)
    found = find_common_losses({first: before, second: after}) if scores is None else Scores.load(scores)
    comparison = compare(before, after, found, (str(first), str(second)))
    show_comparison(comparison)
    print_result(comparison)
