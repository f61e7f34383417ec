"""Requests of tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from kvprof.allocate.dispatch import plan_by
from kvprof.allocate.frontier import frontier as frontier_of
from kvprof.allocate.target import Target
from kvprof.records.frontier import Frontier
from kvprof.records.plan import BitPlan, Window
from kvprof.records.requests.plan import AllocateRequest, FrontierRequest
from kvprof.records.requests.request import Request
from kvprof.records.scores import Scores

R = TypeVar("R", bound=Request)


def changed(request: R, **fields: object) -> R:
    """Return a request with some fields changed; raises UsageError for values that it cannot have."""
    return type(request).of(dict(request) | fields)


def allocate(
    scores: Scores,
    *,
    pins: Sequence[str] = (),
    window: Window | None = None,
    target: Target | None = None,
    **options: object,
) -> BitPlan:
    """Return the plan of a request with these options, as `kvprof allocate` makes it; without a provenance."""
    asked = options | _window(window) | {"pin": pins or None, "target": None if target is None else target.name}
    return plan_by(scores, AllocateRequest.of(asked), target)


def frontier(
    scores: Scores,
    *,
    pins: Sequence[str] = (),
    window: Window | None = None,
    command: str | None = None,
    **options: object,
) -> Frontier:
    """Return the frontier of a request with these options."""
    asked = options | _window(window) | {"pin": pins or None}
    return frontier_of(scores, FrontierRequest.of(asked), command)


def _window(window: Window | None) -> dict[str, int]:
    return {} if window is None else window.model_dump()
