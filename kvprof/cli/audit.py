"""The commands `divergence`, `calibrate` and `audit`: measured losses, and predictions compared with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.measure import Model
from kvprof.cli.options import (
    MEASUREMENT,
    TEXT,
    CalibrationLength,
    Column,
    Config,
    Device,
    DryRun,
    Dtype,
    Out,
    Pack,
    PlannedModel,
    RecentTokens,
    Restart,
    Seed,
    SinkTokens,
    Split,
    Stream,
    SuffixFraction,
    Texts,
    TokenizerName,
    TrustRemoteCode,
)
from kvprof.cli.watching import Watch


def divergence(
    model: Model = None,
    formats: Annotated[
        str,
        typer.Option(help="Formats to measure: int2g64 or key:int3g64c,value:rot2; time is proportional."),
    ] = "int2g64",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to measure, such as 0-3,7.", show_default="all that a plan covers"),
    ] = None,
    data: Texts = None,
    out: Out = None,
    dry_run: DryRun = False,
    sequences: Annotated[
        int, typer.Option(help="Calibration sequences; time is proportional.", rich_help_panel=TEXT)
    ] = 2,
    split: Split = None,
    column: Column = None,
    config: Config = None,
    sequence_length: CalibrationLength = None,
    seed: Seed = 0,
    pack: Pack = False,
    recent_tokens: RecentTokens = 128,
    sink_tokens: SinkTokens = 4,
    tensors: Annotated[
        str, typer.Option(help="Tensors to measure: `key`, `value` or both.", rich_help_panel=MEASUREMENT)
    ] = "key,value",
    suffix_fraction: SuffixFraction = 0.5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stream: Stream = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure the KL of quantizing one tensor of one layer at a time.

    One forward pass per layer, tensor, format and sequence; `audit` compares the result with predictions.
    """
    from kvprof.calibration.spec import USUAL_DATA
    from kvprof.models.load import resolve
    from kvprof.profile.divergence import DivergenceSettings, run_divergence
    from kvprof.records.plan import Window
    from kvprof.report.audits import show_divergence
    from kvprof.report.console import print_note, print_result, print_written, progress
    from kvprof.storage.folders import output_folder

    source = resolve(model, trust_remote_code, tokenizer)
    folder = output_folder(source.id, out)
    settings = DivergenceSettings(
        layers=layers,
        tensors=tensors,
        formats=formats,
        window=Window(sink_tokens=sink_tokens, recent_tokens=recent_tokens),
        suffix_fraction=suffix_fraction,
        data=data or USUAL_DATA,
        split=split,
        column=column,
        config=config,
        sequences=sequences,
        sequence_length=sequence_length,
        seed=seed,
        pack=pack,
        dtype=dtype,
        device=device,
        stream=stream,
    )
    watch = Watch(dry_run)
    with watch.over(device), progress("divergence", "forwards") as advance:
        writing = advance.beside("writing text", "tokens")
        run = run_divergence(source, settings, folder, restart, advance, writing, watch)
    show_divergence(run.scores)
    for remark in run.remarks:
        print_note(remark)
    print_written(run.path)
    print_result(run.scores)


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
