"""The command `generate`: text as the model writes it in full precision and with a plan's cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli.options import PlannedModel, TokenizerName, TrustRemoteCode
from kvprof.cli.request import asks
from kvprof.cli.watching import watched

if TYPE_CHECKING:
    from kvprof.records.requests.check import GenerateRequest


@asks("check.GenerateRequest")
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; `-` reads it from standard input.")],
    plan: Annotated[Path, typer.Option(help="BitPlan file.", show_default=False)],
    model: PlannedModel = None,
    *,
    request: GenerateRequest,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt in full precision and with a plan, side by side."""
    from kvprof.api.quality import generation_as_asked
    from kvprof.records.plan import BitPlan
    from kvprof.report.console import print_note, print_result
    from kvprof.report.continuations import show_continuations

    obeyed = BitPlan.load(plan)
    text = sys.stdin.buffer.read().decode(errors="surrogateescape") if prompt == "-" else prompt
    with watched(
        "generate", "tokens", request.device, model=model, tokenizer=tokenizer, trust_remote_code=trust_remote_code
    ) as job:
        found = generation_as_asked(request, text, obeyed, job)
    show_continuations(found, plan.stem)
    if found.is_vacuous:
        print_note("nothing was quantized: all was within the window. Give a longer prompt, or more --max-new-tokens")
    print_result(found)
