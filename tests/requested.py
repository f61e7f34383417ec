"""Requests of tests."""

from __future__ import annotations

from typing import TypeVar

from kvprof.records.requests.request import Request

R = TypeVar("R", bound=Request)


def changed(request: R, **fields: object) -> R:
    """Return a request with some fields changed; raises UsageError for values that it cannot have."""
    return type(request).of(dict(request) | fields)
