"""The command that looks into what a model caches: spectra."""

from __future__ import annotations

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
    Restart,
    Seed,
    Split,
    Stream,
    Texts,
    TokenizerName,
    TrustRemoteCode,
)
from kvprof.cli.watching import Watch


def spectra(
    model: Model = None,
    out: Out = None,
    data: Texts = None,
    split: Split = None,
    column: Column = None,
    config: Config = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences. Time grows with them.")] = 8,
    sequence_length: CalibrationLength = None,
    seed: Seed = 0,
    pack: Pack = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stream: Stream = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    restart: Restart = False,
) -> None:
    """How large are the cached keys and values, and how many directions do they fill? Their singular values on text."""
    from kvprof.calibration.spec import USUAL_DATA
    from kvprof.models.load import resolve
    from kvprof.profile.reading import TextSettings
    from kvprof.profile.spectra import run_spectra
    from kvprof.report.console import print_note, print_result, print_written, progress
    from kvprof.report.spectra import show_spectra
    from kvprof.storage.folders import output_folder

    source = resolve(model, trust_remote_code, tokenizer)
    folder = output_folder(source.id, out)
    settings = TextSettings(
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
    with watch.over(device), progress("spectra", "sequences") as advance:
        writing = advance.beside("writing text", "tokens")
        run = run_spectra(source, settings, folder, restart, advance, writing, watch)
    show_spectra(run.spectra)
    for remark in run.remarks:
        print_note(remark)
    print_written(run.path)
    print_result(run.spectra)
