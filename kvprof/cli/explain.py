"""Commands that say why a plan is as it is: explain, diff. They read files, never a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli import completion


def explain(
    plan: Annotated[Path, typer.Argument(help="A BitPlan file.")],
    layer: Annotated[list[str], typer.Option(help="Layers to explain: 7 or 3-5. Can be repeated.", show_default=False)],
    tensor: Annotated[
        str | None, typer.Option(help="`key` or `value` alone; of latents `latent` or `rope`.", show_default="both")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="The Scores file that the plan was made from.",
            show_default="found by its digest beside the plan, or in outputs/",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Score to explain by: loss_increase, gradient_norm, spectral_norm or frobenius_norm.",
            show_default="the plan's",
            autocompletion=completion.metrics,
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            help="Formats that compete for the budget: int3g64,key:int2g64c,value:rot2.", show_default="all scored"
        ),
    ] = None,
) -> None:
    """Why does this layer have these bits? What its K and V cost at each format, against the price everywhere."""
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
    first: Annotated[Path, typer.Argument(metavar="A", help="A BitPlan file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="A BitPlan file for the same model.")],
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Scores to predict both plans' KL from.",
            show_default="those that both were made from, else what each file says",
        ),
    ] = None,
) -> None:
    """Which tensors does plan B store differently from plan A? And what does it do to bytes and predicted KL?"""
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
