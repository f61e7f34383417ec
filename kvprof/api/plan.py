"""allocate as a function: from Scores to a BitPlan, without a tensor.

Reads Scores; returns a BitPlan. Writes a file only where a place is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kvprof.allocate.candidates import allowed_by
from kvprof.allocate.constrained import unrestricted
from kvprof.allocate.dispatch import allocate_as_asked, metric_needed
from kvprof.allocate.frontier import frontier
from kvprof.allocate.target import target_remarks
from kvprof.analysis.uncertainty import Uncertainty, uncertainty_of
from kvprof.api.job import check_out, kind_of
from kvprof.errors import UsageError
from kvprof.records.frontier import Frontier
from kvprof.records.plan import BitPlan
from kvprof.records.requests.plan import AllocateRequest, FrontierRequest
from kvprof.records.scores import LOSS_INCREASE, Scores
from kvprof.targets.registry import target_named
from kvprof.workspace.discovery import newest_scores, scores_for
from kvprof.workspace.names import plan_path


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
    device: str | None = None,
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
    given = {name: value for name, value in locals().items() if name != "scores"}
    check_out(out)
    request = AllocateRequest.of(given, of_function=True)
    made = plan_as_asked(request, None if scores is None else _given(scores), _spelled(request))
    if out is not None:
        made.save(Path(out), request)
    return made.plan


class Planned(NamedTuple):
    """A plan, the scores that it was made from, and their file."""

    plan: BitPlan
    scores: Scores
    path: Path

    def save(self, out: Path | None, request: AllocateRequest) -> Path:
        """Write the plan where it goes, `out` or the folder of the model's results; return the file."""
        max_kl = None if request.max_kl is None else str(request.max_kl)
        return self.plan.save(plan_path(self.plan, self.path, out, max_kl))


def plan_as_asked(request: AllocateRequest, scores: tuple[Path, Scores] | None, command: str) -> Planned:
    """Return the plan of a request; raises as `allocate` does.

    scores: and their file; by default those that the request names, else the newest in outputs/ that serve it. command:
    for readers of the plan.
    """
    target = None if request.target is None else target_named(request.target)
    if scores is None and request.scores is not None:
        scores = Path(request.scores), Scores.load(request.scores)
    if scores is None:
        scores = newest_scores(metric_needed(request)) if request.target is None else None
    if scores is None:
        scores = scores_for(str(request.target))
    path, found = scores
    return Planned(allocate_as_asked(found, request, target, command), found, path)


def uncertainty_as_asked(request: AllocateRequest, made: Planned) -> Uncertainty:
    """Return what to doubt of a request's plan, a runtime's way with sliding layers among it."""
    found = uncertainty_of(
        made.scores,
        made.plan,
        tie=request.tie,
        context=request.context,
        batch=request.batch or 1,
        **allowed_by(request),
    )
    if request.target is None:
        return found
    return replace(
        found, remarks=(*found.remarks, *target_remarks(made.plan, target_named(request.target), request.device))
    )


def unrestricted_as_asked(request: AllocateRequest, made: Planned) -> BitPlan | None:
    """Return the best plan that stores no more bits than one for a runtime; None where it is for kvprof's own cache."""
    if request.target is None:
        return None
    return unrestricted(made.scores, made.plan, request.pin or (), request.min_key_bits)


def frontier_as_asked(request: FrontierRequest, command: str) -> tuple[Frontier, Scores, Path]:
    """Return the frontier of a request, and the scores that it is of with their file; raises as `frontier` does."""
    if request.scores is None:
        path, found = newest_scores(LOSS_INCREASE)
    else:
        path, found = Path(request.scores), Scores.load(request.scores)
    return frontier(found, request, command), found, path


def _given(scores: Scores | str | Path) -> tuple[Path, Scores]:
    """Return Scores and their file, read where it is named; raises UsageError for neither."""
    if isinstance(scores, Scores):
        return Path("scores.json"), scores
    if not isinstance(scores, str | Path):
        raise UsageError(
            f"{kind_of(scores)} is no Scores.\n  Give what kvprof.norms or gradients returns, or its file."
        )
    return Path(scores), Scores.load(scores)


def _spelled(request: AllocateRequest) -> str:
    """Return the call that made a plan, for its provenance: what was asked for, defaults left out."""
    return f"kvprof.allocate({', '.join(['scores', *(f'{name}={value!r}' for name, value in request.said().items())])})"
