"""The commands `calibrate` and `audit`: predictions compared with what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli.options import PlannedModel, Restart, TokenizerName, TrustRemoteCode
from kvprof.cli.request import asks
from kvprof.cli.watching import watched

if TYPE_CHECKING:
    from kvprof.records.requests.check import CalibrateRequest


@asks("check.CalibrateRequest")
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
    *,
    request: CalibrateRequest,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure the ratio of a plan's KL to its prediction.

    Whole plans can cost more than the sum of their tensors. The factor found is kept with the scores, and later
    predictions are multiplied by it.
    """
    from kvprof.api.quality import calibration_as_asked
    from kvprof.records.replies import Calibrated
    from kvprof.report.audits import show_calibration
    from kvprof.report.console import print_finished

    with watched(
        "calibrate",
        "forwards",
        request.device,
        model=model,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        restart=restart,
    ) as job:
        run = calibration_as_asked(request, plans or (), scores, job)
    show_calibration(run.plans, run.found)
    print_finished(Calibrated(path=str(run.path), kl_calibration=run.found, plans=run.plans), run.path, run.remarks)


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
