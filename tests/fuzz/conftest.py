"""Memory is measured from a heap in order, which takes long where all that is imported is looked through again."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def frozen_imports() -> Iterator[None]:
    """Keep what is imported out of the garbage collector's sight."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
