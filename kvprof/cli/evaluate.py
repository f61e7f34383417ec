"""The command `evaluate`: the quality that a plan costs, beside baselines that store no more bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvprof.cli.manner import Command
from kvprof.cli.options import DryRun, Out, PlannedModelArgument, Restart, TokenizerName, TrustRemoteCode
from kvprof.cli.request import asks
from kvprof.cli.watching import watched
from kvprof.errors import UsageError
from kvprof.records.requests.option import DEVICE

if TYPE_CHECKING:
    from kvprof.records.requests.check import EvaluateRequest


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


@asks("check.EvaluateRequest")
def evaluate(
    plan: Annotated[Path, typer.Argument(help="BitPlan file.")],
    named: PlannedModelArgument = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Further plans to compare with: one file or several.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The same as MODEL.", show_default=False, rich_help_panel=DEVICE),
    ] = None,
    *,
    request: EvaluateRequest,
    out: Out = None,
    dry_run: DryRun = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure a plan's KL, top-1 and perplexity against baselines.

    Reads held-out text with the plan's cache and in full precision. Baselines are published rules with no more stored
    bits than the plan.
    """
    from kvprof.api.quality import evaluation_as_asked, require_better
    from kvprof.report.console import print_finished
    from kvprof.report.evaluations import show_evaluation

    place = {"tokenizer": tokenizer, "trust_remote_code": trust_remote_code, "out": out, "restart": restart}
    model = model_asked(named, model)
    with watched("evaluate", "forwards", request.device, dry_run, model=model, **place) as job:
        run = evaluation_as_asked(request, plan, against or (), job)
    show_evaluation(run.evaluation)
    print_finished(run.evaluation, run.path, run.remarks)
    if request.check:
        require_better(run.evaluation)
