"""The commands `divergence`, `calibrate` and `audit`: measured losses, and predictions compared with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.options import (
    Device,
    Dtype,
    PlannedModel,
    Restart,
    TokenizerName,
    TrustRemoteCode,
)


def calibrate(
    plans: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PLAN", help="BitPlan files.", show_default="the best plans at 2.5, 3 and 3.5 stored bits"
        ),
    ] = None,
    model: PlannedModel = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Scores file that predicted the plans.",
            show_default="what the plans were made from; else the newest in outputs/",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure on, out of those that were scored.")] = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure the ratio of a plan's KL to its prediction.

    Whole plans can cost more than the sum of their tensors. The factor found is kept with the scores, and later
    predictions are multiplied by it.
    """
    from kvprof.analysis.calibration_plans import predict_plans, usual_plans
    from kvprof.records.plan import BitPlan
    from kvprof.records.scores import Scores
    from kvprof.workspace.names import short_names
    from kvprof.workspace.scores_of_plans import scores_of_plans

    read = {path: BitPlan.load(path) for path in plans or []}
    path, found = scores_of_plans(read) if scores is None else (scores, Scores.load(scores))
    named = dict(zip(short_names(read), read.values(), strict=True)) if read else usual_plans(found)
    predicted = predict_plans(found, named)

    from kvprof.evaluate.kl_factor import CalibrateSettings, run_calibrate
    from kvprof.models.load import resolve
    from kvprof.records.replies import Calibrated
    from kvprof.report.audits import show_calibration
    from kvprof.report.console import print_note, print_result, print_written, progress
    from kvprof.storage.folders import output_folder

    source = resolve(model or predicted[0].plan.model.id, trust_remote_code, tokenizer)
    folder = output_folder(source.id, path.parent)
    settings = CalibrateSettings(sequences, dtype, device)
    with progress("calibrate", "forwards") as advance:
        writing = advance.beside("writing text", "tokens")
        run = run_calibrate(source, found, path, predicted, settings, folder, restart, advance, writing)
    show_calibration(run.plans, run.found)
    for remark in run.remarks:
        print_note(remark)
    print_written(run.path)
    print_result(Calibrated(path=str(run.path), kl_calibration=run.found, plans=run.plans))


def audit(
    divergence: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIVERGENCE",
            help="Measured divergence.json, or its folder.",
            show_default="the newest in outputs/",
        ),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            help="Scores to compare with it. Can be repeated.",
            show_default="gradients.json and norms.json of its folder",
        ),
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            help="Further evaluations of plans, besides those of its folder. Can be repeated.", show_default=False
        ),
    ] = None,
    plans: Annotated[
        list[Path] | None,
        typer.Option(
            help="Further plans that were evaluated, besides those of its folder. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result.", show_default="that of the divergence")
    ] = None,
) -> None:
    """Compare predicted losses with measured divergence.

    Rank correlation and ratio for single tensors and for whole plans, with a picture. Never loads a model.
    """
    from kvprof.analysis.correlation import hold_against
    from kvprof.report.audits import show_audit, show_pictures
    from kvprof.report.console import print_note, print_plain, print_result, print_written
    from kvprof.storage.folders import output_folder
    from kvprof.workspace.audit_inputs import find_audit_files

    files = find_audit_files(divergence, scores or (), evaluations or (), plans or ())
    found = hold_against(files.divergence, files.scores, files.plans, files.evaluations)
    folder = output_folder(files.path.stem, files.path.parent if out is None else out)
    show_audit(found)
    for remark in files.remarks:
        print_note(remark)
    print_plain(f"from {files.path} and {', '.join(files.scores)}")
    print_written(found.save(folder / "audit.json"))
    show_pictures(found, folder / "plots")
    print_result(found)
