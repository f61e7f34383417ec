"""Fixtures for every test. No test writes outside its own temporary folder, or asks a hub for anything.

The demo model's conversion is shared through KVPROF_CACHE, or the user's cache folder; what a model writes itself is
kept apart for each test, but for commands that run in a process of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is first imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is first imported

from filelock import FileLock
from quickstart import RESULTS, VENV, Quickstart, run_quickstart
from tiny import TINY, tiny_model
from transformers import PreTrainedModel

hypothesis.settings.register_profile("kvprof", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("kvprof")  # no test depends on the time it takes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the pages first: their commands take one worker most of the time that all other tests take the second.

    What else looks at the quickstart comes when that is long over, so that no worker waits for it.
    """
    looking = {item.path for item in items if "quickstart" in item.fixturenames}
    first = [item for item in items if item.path.name == "test_pages.py"]
    late = [item for item in items if item.path in looking and item not in first]
    rest = [item for item in items if item.path not in looking]
    middle = 2 * len(rest) // 5
    items[:] = [*first, *rest[:middle], *late, *rest[middle:]]


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """The quickstart, run once from a folder of its own: minutes of measuring that several tests look at.

    Of several workers the first runs it, and the others wait for what it printed.
    """
    if not VENV.exists():
        pytest.skip("the checkout has no .venv: bash tests/run.sh makes one")
    base = tmp_path_factory.getbasetemp()
    printed = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "quickstart.txt"
    with FileLock(printed.with_suffix(".lock")):
        if not printed.exists():
            printed.write_text(run_quickstart(tmp_path_factory.mktemp("elsewhere")), encoding="utf-8")
    return Quickstart(printed.read_text(encoding="utf-8"), RESULTS)


@pytest.fixture(params=sorted(TINY))
def any_tiny(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    """Every tiny model in turn, with its name."""
    return request.param, tiny_model(request.param)


@pytest.fixture(autouse=True)
def own_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what models write themselves, and what GGUF files are converted to, in the test's own folder."""
    monkeypatch.setattr("kvprof.models.conversion.gguf_folder", lambda: tmp_path / "cache" / "gguf")
    monkeypatch.setattr("kvprof.calibration.self_generated.cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that outputs/ is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
