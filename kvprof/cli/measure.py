"""Commands that look at a model: inspect, norms, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(help="A hub id, a folder, a .gguf file, or `demo`.", show_default="the demo model"),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the result.", show_default="outputs/<model>")]


def inspect(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the inventory as JSON instead of a table.")] = False,
) -> None:
    """What does this model cache? Heads, widths and bytes layer by layer, from the config."""
    from kvprof.models.inventory import take_inventory
    from kvprof.models.load import load_config, resolve
    from kvprof.report.console import print_plain
    from kvprof.report.tables import show_inventory

    source = resolve(model)
    inventory = take_inventory(load_config(source), source.id)
    if as_json:
        print_plain(inventory.model_dump_json(indent=2))
    else:
        show_inventory(inventory)


def norms(model: Model = None, out: Out = None) -> None:
    """How large are W_k and W_v, layer by layer? Spectral and Frobenius norm, stable rank. Never loads the model."""
    from kvprof.models.load import resolve
    from kvprof.profile.norms import measure_norms
    from kvprof.records.runs import output_folder
    from kvprof.report.console import print_written, progress
    from kvprof.report.tables import show_red_flags, show_scores

    source = resolve(model)
    folder = output_folder(source.id, out)
    with progress("norms", "layers") as advance:
        scores, inventory = measure_norms(source, advance)
    path = scores.save(folder / "norms.json")
    show_scores(scores)
    show_red_flags(inventory)
    print_written(path)


def gradients(
    model: Model = None,
    out: Out = None,
    data: Annotated[
        str, typer.Option(help="Text: `builtin`, a .txt, .jsonl, .parquet or .csv file, or a hub dataset.")
    ] = "builtin",
    split: Annotated[
        str | None,
        typer.Option(
            help="`calibration` or `held-out` (three rows to one, by hash), `all`; of a hub dataset, its own.",
            show_default="calibration; all of a file; train of a dataset",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences. Time grows with them.")] = 16,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a sequence has at most.", show_default="512, or the model's own limit")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward; changes memory, no score.")] = 1,
    seed: Annotated[int, typer.Option(help="Which rows of the text are taken, and in what order.")] = 0,
    pack: Annotated[bool, typer.Option("--pack", help="Join rows and cut windows of the full length.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[
        str,
        typer.Option(help="auto (the GPU; layers spread over all where one is too small; else the CPU), cpu, cuda:1."),
    ] = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of resuming a stopped run.")] = False,
) -> None:
    """How much does the loss feel each layer's keys and values? One forward and backward serve all."""
    from kvprof.models.load import resolve
    from kvprof.profile.gradients import GradientSettings, run_gradients
    from kvprof.records.runs import output_folder
    from kvprof.report.console import print_note, print_written, progress
    from kvprof.report.tables import show_scores

    source = resolve(model)
    folder = output_folder(source.id, out)
    settings = GradientSettings(data, split, sequences, sequence_length, batch_size, seed, pack, dtype, device)
    with progress("gradients", "sequences") as advance:
        run = run_gradients(source, settings, folder, restart, advance)
    show_scores(run.scores)
    for remark in run.remarks:
        print_note(remark)
    print_written(run.path)
