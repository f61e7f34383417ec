"""The fixtures of these tests."""

from __future__ import annotations

from small_plans import geometry, make_plan, one_thread, source, text  # noqa: F401
