"""Commands that read a file: show, validate, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli import completion
from kvprof.cli.options import TrustRemoteCode

File = Annotated[
    Path, typer.Argument(help="A Scores, BitPlan, Evaluation, Frontier, Audit, Benchmark or Spectra file.")
]


def show(file: File) -> None:
    """Print any Scores, BitPlan, Evaluation, Frontier, Audit, Benchmark or Spectra file as a table."""
    from kvprof.records.audit import Audit
    from kvprof.records.benchmark import Benchmark
    from kvprof.records.evaluation import Evaluation
    from kvprof.records.frontier import Frontier
    from kvprof.records.kinds import load_any
    from kvprof.records.plan import BitPlan
    from kvprof.records.spectra import Spectra
    from kvprof.report.audits import show_audit
    from kvprof.report.benchmarks import show_benchmark
    from kvprof.report.console import print_result
    from kvprof.report.evaluations import show_evaluation
    from kvprof.report.frontiers import show_frontier
    from kvprof.report.plans import show_plan
    from kvprof.report.spectra import show_spectra
    from kvprof.report.tables import show_scores

    document = load_any(file)
    print_result(document)
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
    elif isinstance(document, Spectra):
        show_spectra(document)
    else:
        show_scores(document)


def validate(
    file: File,
    model: Annotated[
        str | None, typer.Argument(help="Check too that the file is for this model.", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Exit with 0, or say what is wrong with a file (1), or that it is for another model than the one named (4)."""
    from kvprof.records.kinds import load_any
    from kvprof.records.replies import Validated
    from kvprof.report.console import print_plain, print_result

    document = load_any(file)
    if model is not None:
        from kvprof.models.identity import check_fits
        from kvprof.models.load import resolve

        check_fits(document, resolve(model, trust_remote_code))
    print_result(Validated(file=str(file), kind=document.kind, model=model))
    print_plain(f"{file}: a valid {document.kind} file" + (f", and it fits {model}" if model else ""))


def schema(
    kind: Annotated[
        str,
        typer.Argument(
            help="A kind of file (`scores`, `plan`, `evaluation`, `frontier`, `audit`, `benchmark` ...), a command, or "
            "`estimate` for what --dry-run answers.",
            autocompletion=completion.schemas,
        ),
    ],
) -> None:
    """Print the JSON Schema of a kind of file, or of what a command prints under --json."""
    from kvprof.api.schemas import schema_for
    from kvprof.report.console import print_json

    print_json(json.dumps(schema_for(kind), indent=2) + "\n")
