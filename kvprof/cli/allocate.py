"""The command `allocate`: from a budget and Scores to a plan file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli import completion
from kvprof.cli.allowed import (
    Bits,
    Formats,
    GroupSize,
    Layers,
    MinKeyBits,
    Pin,
    RecentTokens,
    ScoresFile,
    SinkTokens,
    Tie,
)
from kvprof.records.requests.option import BASELINES, BUDGET, FORMATS


def allocate(
    budget: Annotated[
        str | None,
        typer.Option(help="Average bits per element of the cache, such as 2.5.", show_default=False),
    ] = None,
    max_kl: Annotated[
        str | None,
        typer.Option(
            help="Instead of a budget: the cheapest plan with at most this predicted KL, in nats per token, such as "
            "0.01. Cheapest in stored bits; with --context in bytes.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Plan for another runtime, in its own formats and within its constraints; `kvprof targets` lists "
            "them.",
            show_default="kvprof's own cache",
            autocompletion=completion.targets,
        ),
    ] = None,
    scores: ScoresFile = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the plan, or a file that ends in .json.", show_default="outputs/<model>"),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="What --budget counts: `stored` bits (codes and scales) or `nominal` bits (codes alone).",
            show_default="stored; for a norm nominal",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Instead of --budget: bytes of the cache, window included, such as 1.5GiB. Needs --context.",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence at which --memory and --max-kl count bytes.",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Sequences at which they count bytes.", show_default="1", rich_help_panel=BUDGET),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Score to minimize: loss_increase, gradient_norm, spectral_norm or frobenius_norm.",
            show_default="the first of these that the scores have",
            autocompletion=completion.metrics,
            rich_help_panel=FORMATS,
        ),
    ] = None,
    bits: Bits = None,
    formats: Formats = None,
    group_size: GroupSize = None,
    pin: Pin = None,
    tie: Tie = None,
    min_key_bits: MinKeyBits = None,
    layers: Layers = None,
    recent_tokens: RecentTokens = None,
    sink_tokens: SinkTokens = None,
    rule: Annotated[
        str,
        typer.Option(
            help="`exact` (the optimal plan), or a published baseline: `norm-greedy`, `kvmix`, `uniform`.",
            autocompletion=completion.rules,
            rich_help_panel=BASELINES,
        ),
    ] = "exact",
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published",
            help="norm-greedy, kvmix: exactly as in their papers: no sinks; KVmix's 3-bit keys in groups of 11.",
            rich_help_panel=BASELINES,
        ),
    ] = False,
    top_fraction: Annotated[
        str | None,
        typer.Option(
            help="kvmix: share of the layers that get more bits.", show_default="0.2", rich_help_panel=BASELINES
        ),
    ] = None,
    bits_key: Annotated[
        int | None,
        typer.Option(help="uniform: bits of every key.", show_default=False, rich_help_panel=BASELINES),
    ] = None,
    bits_value: Annotated[
        int | None,
        typer.Option(help="uniform: bits of every value.", show_default=False, rich_help_panel=BASELINES),
    ] = None,
) -> None:
    """Choose the format of every tensor within a budget; write a plan.

    The plan is the one of least predicted loss within --budget, --memory or --max-kl. Reads a Scores file, never a
    model.
    """
    options = dict(locals())
    # For arrays as small as these, starting numpy's pool of threads would cost more than all of the arithmetic.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from kvprof.allocate import metric_needed
    from kvprof.allocate.candidates import Allowed
    from kvprof.allocate.constrained import unrestricted
    from kvprof.allocate.target import sliding_remark
    from kvprof.analysis.uncertainty import uncertainty_of
    from kvprof.api.plan import plan_as_asked
    from kvprof.cli.typed import typed_command
    from kvprof.errors import UsageError
    from kvprof.records.formats import parse_bits
    from kvprof.records.geometry import bytes_text
    from kvprof.records.requests.plan import AllocateRequest
    from kvprof.records.scores import Scores
    from kvprof.report.console import print_note, print_plain, print_result, print_written
    from kvprof.report.plans import plan_remarks, prediction_lines, restriction_lines, show_plan, stability_lines
    from kvprof.targets.registry import target_named
    from kvprof.workspace.names import plan_path

    if as_published and sink_tokens:
        raise UsageError(f"--as-published has no sinks, --sink-tokens asks for {sink_tokens}; leave out one of them.")
    metric_needed(rule)  # an unknown rule is refused before anything is read
    widths = None if bits is None else parse_bits(bits)
    changed = {
        "rule": None if rule == "exact" else rule,
        "bits": widths,
        "as_published": as_published or None,
        "scores": None if scores is None else str(scores),
    }
    request = AllocateRequest.of(**{name: value for name, value in options.items() if name != "out"} | changed)
    named = None if scores is None else (scores, Scores.load(scores))
    plan, found, path = plan_as_asked(request, named, typed_command("allocate", options))
    allowed = Allowed(bits=widths, formats=formats, group_size=group_size, min_key_bits=min_key_bits, pins=pin or ())
    free = None if target is None else unrestricted(found, plan, pin or (), min_key_bits)
    written = plan.save(plan_path(plan, path, out, max_kl))
    show_plan(plan)
    if context is not None:
        held = plan.bytes_at(context, batch or 1)
        asked = "" if memory is None else f", of {memory} asked for"
        print_plain(f"{held} bytes ({bytes_text(held)}) at {context} tokens x {batch or 1}{asked}")
    print_plain(f"from {path}")
    for line in [] if free is None else restriction_lines(plan, free):
        print_plain(line)
    uncertainty = uncertainty_of(found, plan, tie=tie, context=context, batch=batch or 1, **allowed)
    for line in (*prediction_lines(plan, found, uncertainty.best_pair), *stability_lines(uncertainty.stability)):
        print_plain(line)
    sliding = None if target is None else sliding_remark(plan, target_named(target))
    for remark in (*plan_remarks(plan, found), *uncertainty.remarks, *filter(None, [sliding])):
        print_note(remark)
    print_written(written)
    print_result(plan)
