"""A fixture for tests that time: a machine whose cache is tiny, so that few buffers rotate and little is copied."""

from __future__ import annotations

import pytest

SMALL_CACHE = 4096


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times then are of caches, not of memory; no test looks at them."""
    monkeypatch.setattr("kvprof.benchmark.hardware._cpu_cache_bytes", lambda: SMALL_CACHE)
    monkeypatch.setattr("kvprof.benchmark.timing.LEAST_COPIED", 2**16)
