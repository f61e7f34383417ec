"""Commands that read a file: show, validate, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvprof.errors import UsageError, did_you_mean

File = Annotated[Path, typer.Argument(help="A Scores, BitPlan, Evaluation, Frontier, Audit or Benchmark file.")]


def show(file: File) -> None:
    """Print any Scores, BitPlan, Evaluation, Frontier, Audit or Benchmark file as a table."""
    from kvprof.records.audit import Audit
    from kvprof.records.benchmark import Benchmark
    from kvprof.records.evaluation import Evaluation
    from kvprof.records.frontier import Frontier
    from kvprof.records.kinds import load_any
    from kvprof.records.plan import BitPlan
    from kvprof.report.audits import show_audit
    from kvprof.report.benchmarks import show_benchmark
    from kvprof.report.evaluations import show_evaluation
    from kvprof.report.frontiers import show_frontier
    from kvprof.report.plans import show_plan
    from kvprof.report.tables import show_scores

    document = load_any(file)
    if isinstance(document, BitPlan):
        show_plan(document)
    elif isinstance(document, Evaluation):
        show_evaluation(document)
    elif isinstance(document, Frontier):
        show_frontier(document)
    elif isinstance(document, Audit):
        show_audit(document)
    elif isinstance(document, Benchmark):
        show_benchmark(document)
    else:
        show_scores(document)


def validate(
    file: File,
    model: Annotated[
        str | None, typer.Argument(help="Check too that the file is for this model.", show_default=False)
    ] = None,
) -> None:
    """Exit with 0, or say what is wrong with a file (1), or that it is for another model than the one named (4)."""
    from kvprof.records.kinds import load_any
    from kvprof.report.console import print_plain

    document = load_any(file)
    if model is not None:
        from kvprof.models.identity import check_fits
        from kvprof.models.load import resolve

        check_fits(document, resolve(model))
    print_plain(f"{file}: a valid {document.kind} file" + (f", and it fits {model}" if model else ""))


def schema(
    kind: Annotated[str, typer.Argument(help="`scores`, `plan`, `evaluation`, `frontier`, `audit` or `benchmark`.")],
) -> None:
    """Print the JSON Schema of Scores, BitPlan, Evaluation, Frontier, Audit or Benchmark files."""
    from kvprof.records.kinds import KINDS
    from kvprof.report.console import print_plain

    if kind not in KINDS:
        raise UsageError(f"unknown kind of file {kind!r}: {did_you_mean(kind, KINDS)}")
    print_plain(json.dumps(KINDS[kind].model_json_schema(by_alias=True), indent=2))
