"""The command `spectra`: singular values of what a model caches."""

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
    data: Texts = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences; time is proportional.")] = 8,
    out: Out = None,
    dry_run: DryRun = False,
    split: Split = None,
    column: Column = None,
    config: Config = None,
    sequence_length: CalibrationLength = None,
    seed: Seed = 0,
    pack: Pack = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stream: Stream = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure the singular values of the cached keys and values.

    Computed on calibration text, for each layer, with their effective rank.
    """
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
