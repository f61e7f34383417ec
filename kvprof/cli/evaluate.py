"""The command `evaluate`: the quality that a plan costs, beside baselines that store no more bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kvprof.cli.manner import Command
from kvprof.cli.options import (
    Column,
    Config,
    Device,
    DryRun,
    Dtype,
    HeldOutSplit,
    HeldOutTexts,
    Out,
    Pack,
    Restart,
    Seed,
    SequenceLength,
    Stream,
    TokenizerName,
    TrustRemoteCode,
)
from kvprof.cli.watching import Watch
from kvprof.errors import UsageError
from kvprof.records.requests.option import BASELINES, DEVICE, MEASUREMENT


class TakesSeveralFiles(Command):
    """A command whose `--against a.json b.json` means `--against a.json --against b.json`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag before each further value, up to the next option."""
        repeated: list[str] = []
        inside = False
        for arg in args:
            is_option = arg.startswith("-")
            if inside and not is_option and repeated[-1] != "--against":
                repeated.append("--against")
            repeated.append(arg)
            inside = arg.partition("=")[0] == "--against" if is_option else inside
        return super().parse_args(ctx, repeated)


def model_asked(named: str | None, model: str | None) -> str | None:
    """Return the model that the argument MODEL or the option --model names.

    Raises UsageError where both do, and where MODEL is a file that holds no model: most likely a second plan.
    """
    if named is None:
        return model
    if model is not None:
        raise UsageError(f"MODEL is {named!r} and --model is {model!r}.\n  Leave out one of them.")
    path = Path(os.path.expanduser(named))
    if (path.suffix == ".json" and not os.path.isdir(path)) or (os.path.isfile(path) and path.suffix != ".gguf"):
        raise UsageError(
            f"{named} is no model, which the second argument is.\n"
            f"  Compare plans with --against {named}. Of the two arguments, the plan comes first."
        )
    return named


def evaluate(
    plan: Annotated[Path, typer.Argument(help="BitPlan file.")],
    named: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, folder, .gguf file, or `demo`.",
            show_default="the plan's model; if it names none, the demo model",
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Further plans to compare with: one file or several.", show_default=False),
    ] = None,
    data: HeldOutTexts = None,
    sequences: Annotated[
        int, typer.Option(help="Sequences of text; time is proportional, and the error shrinks.")
    ] = 12,
    out: Out = None,
    dry_run: DryRun = False,
    split: HeldOutSplit = None,
    column: Column = None,
    config: Config = None,
    sequence_length: SequenceLength = None,
    seed: Seed = 0,
    pack: Pack = False,
    rivals: Annotated[
        bool,
        typer.Option(
            "--rivals/--no-rivals",
            help="Compare with published baselines that store no more bits.",
            rich_help_panel=BASELINES,
        ),
    ] = True,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Exit with 5 unless the plan's mean KL is the lowest of all that store no more bits.",
            rich_help_panel=BASELINES,
        ),
    ] = False,
    measure_from: Annotated[
        int,
        typer.Option(
            min=0, help="First position that is measured; earlier ones are only read.", rich_help_panel=MEASUREMENT
        ),
    ] = 0,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Decode token by token with the packed cache: the same numbers, far slower.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="The same as MODEL.", show_default=False, rich_help_panel=DEVICE),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stream: Stream = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure a plan's KL, top-1 and perplexity against baselines.

    Reads held-out text with the plan's cache and in full precision. Baselines are published rules with no more stored
    bits than the plan.
    """
    from kvprof.api.quality import find_baseline_scores, published_baselines, require_better
    from kvprof.calibration.text import BUILTIN
    from kvprof.evaluate.evaluation import EvaluationSettings, check_request, run_evaluation
    from kvprof.models.load import resolve
    from kvprof.records.plan import BitPlan
    from kvprof.records.requests.measure import GradientsRequest
    from kvprof.report.console import print_note, print_result, print_written, progress
    from kvprof.report.evaluations import show_evaluation
    from kvprof.storage.folders import output_folder
    from kvprof.workspace.names import short_names

    if check and not rivals and not against:
        raise UsageError("--check has nothing to compare with.\n  Leave out --no-rivals, or name plans with --against.")
    model = model_asked(named, model)
    found = BitPlan.load(plan)
    name, *others = short_names([plan, *(against or ())])
    further = [(other, BitPlan.load(path)) for other, path in zip(others, against or (), strict=True)]
    source = resolve(model or found.model.id, trust_remote_code, tokenizer)
    folder = output_folder(source.id, out)
    settings = EvaluationSettings(
        tuple(data or (BUILTIN,)),
        split,
        sequences,
        sequence_length,
        measure_from,
        seed,
        pack,
        dtype,
        device,
        exact,
        stream,
        column,
        config,
    )
    if rivals or check:  # run_evaluation checks the same, but after the baselines are measured
        check_request(source, [(name, found), *further], settings, compares=check)
    measuring = GradientsRequest(dtype=dtype, device=device, stream=stream)
    published = []
    if rivals and not dry_run:
        published = published_baselines(found, plan, source, folder, measuring, restart, progress)
    if rivals and dry_run:
        ready = find_baseline_scores(found, plan, source, folder)
        if ready.norms is not None and ready.gradients is not None:
            published = ready.plans(ready.norms, ready.gradients)
        else:
            print_note("baselines are not counted: their scores are measured first, then nine forwards a sequence more")
    watch = Watch(dry_run)
    with watch.over(device), progress("evaluate", "forwards") as advance:
        writing = advance.beside("writing text", "tokens")
        run = run_evaluation(
            source, found, settings, folder, published, further, name, restart, advance, writing, watch
        )
    show_evaluation(run.evaluation)
    for remark in run.remarks:
        print_note(remark)
    print_written(run.path)
    print_result(run.evaluation)
    if check:
        require_better(run.evaluation)
