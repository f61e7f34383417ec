"""What models are called: the word for the demo model, and the nearest name to one that there is not.

Looks at the working folder and at the hub's own cache; does not know how a model is loaded.
"""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path

DEMO = "demo"


def nearest_model(word: str) -> str:
    """Return a clause that names the model on this machine whose name is nearest to a misspelt one; else nothing."""
    names: dict[str, str] = {DEMO: DEMO}
    with contextlib.suppress(OSError):
        names |= {one.name: f"./{one.name}" for one in Path().iterdir() if _is_model(one)}
    with contextlib.suppress(OSError):
        names |= {name: name for name in _fetched_before()}
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    return f"Did you mean {names[near[0]]}? " if near else ""


def nearest_path(path: Path) -> str:
    """Return a clause that names the model beside a path that is not there, where it is called nearly so."""
    with contextlib.suppress(OSError):
        beside = {one.name for one in path.parent.iterdir() if _is_model(one)}
        if near := difflib.get_close_matches(path.name, beside, n=1):
            return f"Did you mean {path.parent / near[0]}?"
    return ""


def _is_model(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def _fetched_before() -> list[str]:
    """Return the hub ids in the hub's own cache, whose folders are called models--org--name."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*")
    return [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]
