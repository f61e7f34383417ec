"""The command that lets a person read what a plan does to a model's words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.options import Dtype, PlannedModel, TokenizerName, TrustRemoteCode


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; `-` reads it from standard input.")],
    plan: Annotated[Path, typer.Option(help="A BitPlan file.", show_default=False)],
    model: PlannedModel = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="Randomness of the choice; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Where the randomness begins, the same for both.")
    ] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    dtype: Dtype = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Annotated[str, typer.Option(help="auto (the GPU, else the CPU), cpu, cuda:1.")] = "auto",
) -> None:
    """What does the plan do to the model's words? The same prompt continued in full precision and as planned."""
    from kvprof.records.plan import BitPlan

    obeyed = BitPlan.load(plan)

    from kvprof.evaluate.generation import GenerationSettings, compare_continuations
    from kvprof.models.load import resolve
    from kvprof.report.console import print_note, print_result, progress
    from kvprof.report.continuations import show_continuations

    text = sys.stdin.buffer.read().decode(errors="surrogateescape") if prompt == "-" else prompt
    settings = GenerationSettings(max_new_tokens, temperature, seed, chat, dtype, device)
    with progress("generate", "tokens") as advance:
        found = compare_continuations(
            resolve(model or obeyed.model.id, trust_remote_code, tokenizer), obeyed, text, settings, advance
        )
    show_continuations(found, plan.stem)
    if found.is_vacuous:
        print_note("nothing was quantized: all was within the window. Give a longer prompt, or more --max-new-tokens")
    print_result(found)
