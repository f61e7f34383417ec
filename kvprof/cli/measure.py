"""The commands `inspect`, `norms` and `gradients`, which read a model."""

from __future__ import annotations

from typing import Annotated

import typer

from kvprof.cli import completion
from kvprof.cli.allowed import Layers
from kvprof.cli.options import (
    FORMATS,
    MEASUREMENT,
    RECENT_TOKENS,
    SINK_TOKENS,
    WINDOW,
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
    SuffixFraction,
    Texts,
    TokenizerName,
    TrustRemoteCode,
    within,
)
from kvprof.cli.watching import Watch

Model = Annotated[
    str | None,
    typer.Argument(help="Hub id, folder, .gguf file, or `demo`.", show_default="the demo model"),
]


def inspect(model: Model = None, trust_remote_code: TrustRemoteCode = False) -> None:
    """List the KV heads, widths and bytes that each layer caches.

    Reads the model's config alone.
    """
    from kvprof.models.inventory import take_inventory
    from kvprof.models.load import load_config, resolve
    from kvprof.report.console import print_result
    from kvprof.report.tables import show_inventory

    source = resolve(model, trust_remote_code)
    inventory = take_inventory(load_config(source), source.id)
    show_inventory(inventory)
    print_result(inventory)


def norms(
    model: Model = None,
    out: Out = None,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Compute the norms of each layer's key and value projections.

    Spectral norm, Frobenius norm and stable rank of W_k and W_v, read tensor by tensor: the model is never loaded.
    """
    from kvprof.models.load import resolve
    from kvprof.profile.norms import run_norms
    from kvprof.report.console import print_fetched, print_note, print_result, print_written, progress
    from kvprof.report.tables import show_red_flags, show_scores, show_weight_sharing
    from kvprof.storage.folders import output_folder

    source = resolve(model, trust_remote_code)
    folder = output_folder(source.id, out)
    watch = Watch(dry_run)
    with watch.over("cpu"), progress("norms", "bytes") as advance:
        run = run_norms(source, folder, restart, advance, watch)
    show_scores(run.scores)
    show_weight_sharing(run.inventory.geometry)
    show_red_flags(run.inventory)
    for remark in run.remarks:
        print_note(remark)
    if run.fetched is not None:
        print_fetched(run.fetched.fetched_bytes, run.fetched.whole_bytes)
    print_written(run.path)
    print_result(run.scores)


def gradients(
    model: Model = None,
    data: Texts = None,
    sequences: Annotated[
        int | None,
        typer.Option(help="Calibration sequences; time is proportional.", show_default="8; 32 with --until-stable"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Predict the losses of another runtime's formats; `kvprof targets` lists the runtimes.",
            show_default="kvprof's own cache",
            autocompletion=completion.targets,
        ),
    ] = None,
    out: Out = None,
    dry_run: DryRun = False,
    split: Split = None,
    column: Column = None,
    config: Config = None,
    sequence_length: CalibrationLength = None,
    seed: Seed = 0,
    pack: Pack = False,
    formats: Annotated[
        str | None,
        typer.Option(
            help="Formats whose loss to predict: int3g64,rot2 or key:int2g64c,value:rot2; or `none`.",
            show_default="15 for keys, 10 for values",
            rich_help_panel=FORMATS,
        ),
    ] = None,
    layers: Layers = None,
    recent_tokens: Annotated[
        int | None,
        typer.Option(
            callback=within(0, 2**31),
            help=RECENT_TOKENS,
            show_default="128, or the target's",
            rich_help_panel=WINDOW,
        ),
    ] = None,
    sink_tokens: Annotated[
        int | None,
        typer.Option(
            callback=within(0, 2**31), help=SINK_TOKENS, show_default="4, or the target's", rich_help_panel=WINDOW
        ),
    ] = None,
    suffix_fraction: SuffixFraction = 0.5,
    until_stable: Annotated[
        bool,
        typer.Option(
            "--until-stable",
            help="Stop before --sequences once more sequences would change no plan.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False,
    stable_at: Annotated[
        list[str] | None,
        typer.Option(
            help="Budget, in stored bits, of a plan that --until-stable watches. Can be repeated.",
            show_default="2.5, 3, 3.5",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Measure one part of the sequences, such as 2/8; `kvprof merge` adds the parts up.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(help="Sequences per forward; changes speed and memory, no score.", rich_help_panel=MEASUREMENT),
    ] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stream: Stream = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure gradient norms and the predicted loss of every format.

    Both on calibration text, for the keys and the values of each layer; `allocate` plans from the result.
    """
    from kvprof.analysis.stability import StableAt
    from kvprof.api.measure import decoder_asked
    from kvprof.calibration.spec import USUAL_DATA
    from kvprof.errors import UsageError
    from kvprof.models.load import resolve
    from kvprof.profile.reading import USUAL_SEQUENCES
    from kvprof.profile.request import SEQUENCES_UNTIL_STABLE, SensitivitySettings
    from kvprof.profile.sensitivity import run_sensitivity
    from kvprof.profile.shards import read_share
    from kvprof.report.console import print_note, print_result, print_written, progress
    from kvprof.report.tables import show_scores
    from kvprof.storage.folders import OUTPUTS, output_folder, slug
    from kvprof.targets.registry import target_named

    if stable_at and not until_stable:
        raise UsageError("--stable-at says what --until-stable looks at, which is not there.\n  Add --until-stable.")
    source = resolve(model, trust_remote_code, tokenizer)
    runtime = None if target is None else target_named(target)
    decoder = decoder_asked(formats, runtime, sink_tokens, recent_tokens, suffix_fraction, layers)
    if sequences is None:
        sequences = SEQUENCES_UNTIL_STABLE if until_stable else USUAL_SEQUENCES
    settings = SensitivitySettings(
        data=tuple(data or USUAL_DATA),
        split=split,
        column=column,
        config=config,
        sequences=sequences,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        pack=pack,
        dtype=dtype,
        device=device,
        stream=stream,
        share=read_share(shard) if shard is not None else None,
        decoder=decoder,
    )
    if out is None and runtime is not None:
        out = OUTPUTS / slug(source.id) / runtime.name
    folder = output_folder(source.id, out)
    question = StableAt(stable_at or ()) if until_stable else None
    watch = Watch(dry_run)
    with watch.over(device), progress("gradients", "sequences") as advance:
        run = run_sensitivity(
            source,
            settings,
            folder,
            restart,
            advance,
            advance.beside("writing text", "tokens"),
            question,
            question.check if question else None,
            watch,
        )
    show_scores(run.scores, brief=True)
    for remark in run.remarks:
        print_note(remark)
    print_written(run.path)
    print_result(run.scores)
