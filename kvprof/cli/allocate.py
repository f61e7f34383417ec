"""The command that spends a budget: from Scores to a plan file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.options import GroupSize, RecentTokens, SinkTokens


def allocate(
    budget: Annotated[
        str | None,
        typer.Option(help="Bits an element of the cache may cost on average, such as 2.5.", show_default=False),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="What --budget counts: `nominal` (the codes) or `stored` (the scales too).", show_default="nominal"
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Bytes of cache instead of bits, window and all: 1.5GiB. Needs --context.", show_default=False
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens a sequence that --memory must hold.", show_default=False)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences that --memory must hold.", show_default="1")] = None,
    rule: Annotated[
        str, typer.Option(help="`exact`, or a published rival: `norm-greedy`, `kvmix`, `uniform`.")
    ] = "exact",
    metric: Annotated[
        str | None,
        typer.Option(
            help="Score to spend by: gradient_norm, spectral_norm or frobenius_norm.",
            show_default="the scores' first of these",
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="Widths to choose from, of 1,2,3,4,5,6,8,16.", show_default="1,2,3,4,6,8")
    ] = None,
    group_size: GroupSize = 32,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="Fix a tensor's bits: key:0=8, value:3-5=4, key:*=4. Can be repeated.", show_default=False),
    ] = None,
    recent_tokens: RecentTokens = 128,
    sink_tokens: SinkTokens = 4,
    top_fraction: Annotated[
        str | None, typer.Option(help="kvmix: the share of layers that get more bits.", show_default="0.2")
    ] = None,
    bits_key: Annotated[int | None, typer.Option(help="uniform: bits of every key.", show_default=False)] = None,
    bits_value: Annotated[int | None, typer.Option(help="uniform: bits of every value.", show_default=False)] = None,
    scores: Annotated[
        Path | None, typer.Option(help="A Scores file.", show_default="the newest in outputs/ that has the metric")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the plan, or a file that ends in .json.", show_default="outputs/<model>"),
    ] = None,
) -> None:
    """Spend a budget of bits where they buy the most; write the plan. Reads scores, never a model."""
    # For arrays as small as these, starting numpy's pool of threads would cost more than all of the arithmetic.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from kvprof.allocate import allocate as make_plan
    from kvprof.allocate.budget import parse_bits
    from kvprof.records.files import newest_scores, plan_path
    from kvprof.records.geometry import bytes_text
    from kvprof.records.plan import Window
    from kvprof.records.scores import Scores
    from kvprof.report.console import print_note, print_plain, print_written
    from kvprof.report.sentences import plan_remarks
    from kvprof.report.tables import show_plan

    wanted = "gradient_norm" if rule == "kvmix" else metric
    path, found = newest_scores(wanted) if scores is None else (scores, Scores.load(scores))
    plan = make_plan(
        found,
        rule=rule,
        budget=budget,
        unit=unit,
        memory=memory,
        context=context,
        batch=batch,
        metric=metric,
        bits=None if bits is None else parse_bits(bits),
        top_fraction=top_fraction,
        bits_key=bits_key,
        bits_value=bits_value,
        group_size=group_size,
        pins=pin or (),
        window=Window(sink_tokens=sink_tokens, recent_tokens=recent_tokens),
        command=" ".join(["kvprof", *sys.argv[1:]]),
    )
    written = plan.save(plan_path(plan, path, out))
    show_plan(plan)
    if context is not None:
        held = plan.bytes_at(context, batch or 1)
        print_plain(f"{held} bytes ({bytes_text(held)}) at {context} tokens x {batch or 1}, of {memory} asked for")
    print_plain(f"from {path}")
    for remark in plan_remarks(plan, found):
        print_note(remark)
    print_written(written)
