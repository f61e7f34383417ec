"""allocate as a function: from Scores to a BitPlan, without a tensor.

Reads Scores; returns a BitPlan. Writes a file only where a place is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvprof.allocate import allocate_as_asked, metric_needed
from kvprof.api.given import (
    check_around,
    check_flags,
    check_range,
    check_whole,
    check_window,
    check_words,
    joined,
    scores_given,
    several,
)
from kvprof.errors import UsageError
from kvprof.records.formats import known_bits, parse_bits
from kvprof.records.plan import BitPlan
from kvprof.records.requests.plan import AllocateRequest
from kvprof.records.scores import Scores
from kvprof.targets.registry import target_named
from kvprof.workspace.discovery import newest_scores, scores_for
from kvprof.workspace.names import plan_path

LARGEST_GROUP = 2**31


def allocate(
    scores: Scores | str | Path | None = None,
    budget: str | float | None = None,
    *,
    unit: str | None = None,
    memory: str | int | None = None,
    context: int | None = None,
    batch: int | None = None,
    max_kl: str | float | None = None,
    rule: str = "exact",
    metric: str | None = None,
    bits: str | int | Sequence[int] | None = None,
    formats: str | Sequence[str] | None = None,
    group_size: int | None = None,
    pin: str | Sequence[str] | None = None,
    tie: str | None = None,
    min_key_bits: int | None = None,
    recent_tokens: int | None = None,
    sink_tokens: int | None = None,
    target: str | None = None,
    layers: str | None = None,
    top_fraction: str | float | None = None,
    as_published: bool = False,
    bits_key: int | None = None,
    bits_value: int | None = None,
    out: str | Path | None = None,
) -> BitPlan:
    """Spend a budget of bits where they buy the most, as `kvprof allocate` does. Never loads a model, nor torch.

    scores: Scores, or their file; by default the newest in outputs/ that serve, as for the command. budget: bits an
    element of the cache may cost on average, counted in `unit`: "stored" (codes and scales; the default by
    loss_increase) or "nominal" (codes alone; the default by a norm). memory, context, batch: bytes of cache instead, or
    a text such as "1.5GiB", for `batch` sequences of `context` tokens. max_kl: the cheapest plan predicted to stay at
    or below so many nats a token. bits, formats, group_size, min_key_bits: what the plan may choose from; pin: tensors
    set by hand, such as "key:0=8". layers: `all` or `full`: whether those of a sliding window are planned. sink_tokens,
    recent_tokens: the window in full precision. The rest is named as the command's options are. out: a folder for the
    plan, or its file that ends in .json; without it nothing is written.
    Returns the BitPlan, the best one there is where `solver.optimal`; it never costs more than the budget.
    Raises InfeasibleBudget, with the range that can be reached; UsageError for options that do not go together;
    InvalidFile for scores that cannot be read, or lack what the rule needs.
    """
    check_words(unit=unit, rule=rule, metric=metric, tie=tie, target=target, layers=layers)
    check_flags(as_published=as_published)
    check_around(out)
    check_window(sink_tokens, recent_tokens)
    if as_published and sink_tokens:
        raise UsageError(f"as_published has no sinks, sink_tokens asks for {sink_tokens}; leave out one of them.")
    check_whole(context=context, batch=batch, group_size=group_size, min_key_bits=min_key_bits)
    check_range("group_size", group_size, 1, LARGEST_GROUP)
    check_range("min_key_bits", min_key_bits, 1, 16)
    request = AllocateRequest.of(
        budget=budget,
        unit=unit,
        memory=f"{memory}B" if isinstance(memory, int) and not isinstance(memory, bool) else memory,
        context=context,
        batch=batch,
        max_kl=max_kl,
        rule=None if rule == "exact" else rule,
        metric=metric,
        bits=None if bits is None else _widths(bits),
        formats=joined(formats),
        group_size=group_size,
        pin=None if pin is None else several(pin),
        tie=tie,
        min_key_bits=min_key_bits,
        target=target,
        layers=layers,
        top_fraction=top_fraction,
        as_published=as_published or None,
        bits_key=bits_key,
        bits_value=bits_value,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
    )
    given = None if scores is None else scores_given(scores)
    path = Path("scores.json") if scores is None or isinstance(scores, Scores) else Path(scores)
    made = plan_as_asked(request, None if given is None else (path, given), _spelled(request))
    if out is not None:
        made.plan.save(plan_path(made.plan, made.path, Path(out), None if max_kl is None else str(max_kl)))
    return made.plan


class Planned(NamedTuple):
    """A plan, the scores that it was made from, and their file."""

    plan: BitPlan
    scores: Scores
    path: Path


def plan_as_asked(request: AllocateRequest, scores: tuple[Path, Scores] | None, command: str) -> Planned:
    """Return the plan of a request; raises as `allocate` does.

    scores: and their file; by default the newest in outputs/ that serve the request. command: for readers of the plan.
    """
    target = None if request.target is None else target_named(request.target)
    if scores is None and request.target is not None:
        scores = scores_for(request.target)
    if scores is None:
        rule = request.rule or "exact"
        scores = newest_scores(metric_needed(rule, request.metric, request.max_kl, request.formats, request.target))
    path, found = scores
    return Planned(allocate_as_asked(found, request, target, command), found, path)


def _widths(bits: str | int | Sequence[int]) -> tuple[int, ...]:
    return parse_bits(str(bits)) if isinstance(bits, str | int) else known_bits(several(bits))  # type: ignore[arg-type]


def _spelled(request: AllocateRequest) -> str:
    """Return the call that made a plan, for its provenance: what was said, without what goes without saying."""
    return f"kvprof.allocate({', '.join(['scores', *(f'{name}={value!r}' for name, value in request.said().items())])})"
