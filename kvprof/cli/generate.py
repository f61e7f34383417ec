"""The command `generate`: text as the model writes it in full precision and with a plan's cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.options import Dtype, PlannedModel, TokenizerName, TrustRemoteCode, within
from kvprof.records.requests.option import DEVICE, MEASUREMENT


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; `-` reads it from standard input.")],
    plan: Annotated[Path, typer.Option(help="BitPlan file.", show_default=False)],
    model: PlannedModel = None,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most likely token.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    seed: Annotated[
        int,
        typer.Option(
            callback=within(0, 2**32 - 1),
            help="Seed of the sampling, the same for both texts.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = 0,
    dtype: Dtype = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda:1, or auto: the GPU, else the CPU.", rich_help_panel=DEVICE)
    ] = "auto",
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt in full precision and with a plan, side by side."""
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
