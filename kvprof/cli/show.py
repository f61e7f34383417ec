"""The commands `show`, `validate` and `schema`, which read a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli import completion
from kvprof.cli.options import TrustRemoteCode

File = Annotated[Path, typer.Argument(help="Scores, BitPlan, Evaluation, Frontier, Audit, Benchmark or Spectra file.")]


def show(file: File) -> None:
    """Print any file that kvprof writes as a table.

    Scores, BitPlan, Evaluation, Frontier, Audit, Benchmark or Spectra.
    """
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
        str | None,
        typer.Argument(
            help="Model that the file must be for: hub id, folder, .gguf file, or `demo`.", show_default="not checked"
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check that a file is valid, and that it fits a model.

    Exits with 1 if the file is not valid, and with 4 if it is for another model.
    """
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
            help="Kind of file (`scores`, `plan`, `evaluation`, `frontier`, `audit`, `benchmark` ...), a command, or "
            "`estimate` for the answer of --dry-run.",
            autocompletion=completion.schemas,
        ),
    ],
) -> None:
    """Print the JSON Schema of a file, or of a command's answer to --json."""
    from kvprof.api.schemas import schema_for
    from kvprof.report.console import print_json

    print_json(json.dumps(schema_for(kind), indent=2) + "\n")
