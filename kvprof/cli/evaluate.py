"""The command that measures what a plan costs in quality, beside rivals that store no more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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
    PlannedModel,
    Restart,
    Seed,
    SequenceLength,
    Stream,
    TokenizerName,
    TrustRemoteCode,
)
from kvprof.cli.watching import Watch


class TakesSeveralFiles(TyperCommand):
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


def evaluate(
    plan: Annotated[Path, typer.Argument(help="A BitPlan file.")],
    model: PlannedModel = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Further plans to compare with: one file or several, after PLAN.", show_default=False),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Exit with 5 unless the plan beats all that store no more bits, by mean KL."),
    ] = False,
    rivals: Annotated[
        bool, typer.Option("--rivals/--no-rivals", help="Compare with published rules that store no more.")
    ] = True,
    exact: Annotated[
        bool, typer.Option("--exact", help="Token by token through the packed cache; the same numbers, far slower.")
    ] = False,
    data: HeldOutTexts = None,
    split: HeldOutSplit = None,
    column: Column = None,
    config: Config = None,
    sequences: Annotated[int, typer.Option(help="Sequences of text. Time grows with them; the error shrinks.")] = 12,
    sequence_length: SequenceLength = None,
    measure_from: Annotated[
        int, typer.Option(min=0, help="First position that counts; those before it are only read.")
    ] = 0,
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
    """What does the plan cost in quality? KL, top-1 and perplexity on held-out text, beside rivals of equal size."""
    from kvprof.api.quality import find_baseline_scores, published_baselines, require_better
    from kvprof.calibration.text import BUILTIN
    from kvprof.errors import UsageError
    from kvprof.evaluate.evaluation import EvaluationSettings, check_request, run_evaluation
    from kvprof.models.load import resolve
    from kvprof.profile.request import SensitivitySettings
    from kvprof.records.plan import BitPlan
    from kvprof.report.console import print_note, print_result, print_written, progress
    from kvprof.report.evaluations import show_evaluation
    from kvprof.storage.folders import output_folder
    from kvprof.workspace.names import short_names

    if check and not rivals and not against:
        raise UsageError("--check has nothing to compare with.\n  Leave out --no-rivals, or name plans with --against.")
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
    if rivals or check:  # run_evaluation asks the same, but after what the baselines need
        check_request(source, [(name, found), *further], settings, compares=check)
    measuring = SensitivitySettings(dtype=dtype, device=device, stream=stream)
    published = []
    if rivals and not dry_run:
        published = published_baselines(found, plan, source, folder, measuring, restart, progress)
    if rivals and dry_run:
        ready = find_baseline_scores(found, plan, source, folder)
        if ready.norms is not None and ready.gradients is not None:
            published = ready.plans(ready.norms, ready.gradients)
        else:
            print_note("rivals are not counted: their scores are measured first, then nine forwards a sequence more")
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
