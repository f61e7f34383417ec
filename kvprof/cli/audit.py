"""The commands that hold scores against what is measured: divergence, calibrate, audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.measure import Model
from kvprof.cli.options import (
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
    layers: Annotated[
        str | None, typer.Option(help="Layers to measure: 0-3,7.", show_default="all that a plan covers")
    ] = None,
    tensors: Annotated[str, typer.Option(help="`key`, `value` or both.")] = "key,value",
    formats: Annotated[
        str, typer.Option(help="Formats to measure: int2g64, key:int3g64c,value:rot2. Time grows with them.")
    ] = "int2g64",
    suffix_fraction: SuffixFraction = 0.5,
    sink_tokens: SinkTokens = 4,
    recent_tokens: RecentTokens = 128,
    data: Texts = None,
    split: Split = None,
    column: Column = None,
    config: Config = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences. Time grows with them.")] = 2,
    sequence_length: CalibrationLength = None,
    seed: Seed = 0,
    pack: Pack = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stream: Stream = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Out = None,
    dry_run: DryRun = False,
    restart: Restart = False,
) -> None:
    """How far do predictions move when one tensor of one layer is quantized? Measured, a forward for each number."""
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
            help="The Scores file that predicted the plans.",
            show_default="what the plans were made from; else the newest in outputs/",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure on, of those that the scores read.")] = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """By what factor do whole plans cost more than the sum of their tensors? Measured, and kept with the scores."""
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
            help="A measured divergence, or the folder that holds divergence.json.",
            show_default="the newest in outputs/",
        ),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            help="Scores to hold against it. Can be repeated.", show_default="gradients.json and norms.json beside it"
        ),
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(help="Evaluations of whole plans, besides those in its folder.", show_default=False),
    ] = None,
    plans: Annotated[
        list[Path] | None,
        typer.Option(help="Plans that were evaluated, besides those in its folder.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result.", show_default="that of the divergence")
    ] = None,
) -> None:
    """How well do scores predict what was measured? Ranks, sizes, whole plans, a picture. Never loads a model."""
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
