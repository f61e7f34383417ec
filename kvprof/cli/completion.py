"""Shell completion of words that are neither commands nor files: recipes, runtimes, rules, metrics, schemas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path


def recipes(incomplete: str) -> list[str]:
    """Return the recipes of kvprof, and the recipe files and folders here, that begin with this text."""
    from kvprof.recipes.shipped import shipped_recipes

    folder, slash, last = incomplete.rpartition("/")
    beside = [path for path in sorted(Path(folder or slash or ".").glob(f"{last}*")) if last or path.name[0] != "."]
    own = [f"{path}/" if path.is_dir() else str(path) for path in beside if path.is_dir() or path.suffix == ".toml"]
    return _begun(incomplete, [*shipped_recipes(), *own])


def targets(incomplete: str) -> list[str]:
    """Return the runtimes that begin with this text."""
    from kvprof.targets.registry import TARGETS

    return _begun(incomplete, TARGETS)


def rules(incomplete: str) -> list[str]:
    """Return the values of `--rule` that begin with this text."""
    from kvprof.records.requests.plan import RULES

    return _begun(incomplete, RULES)


def metrics(incomplete: str) -> list[str]:
    """Return the metrics that begin with this text."""
    from kvprof.records.scores import METRICS

    return _begun(incomplete, METRICS)


def schemas(incomplete: str) -> list[str]:
    """Return the kinds of file and the commands that begin with this text."""
    from kvprof.api.schemas import schema_words

    return _begun(incomplete, schema_words())


def among(words: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a completion to these words."""

    def complete(incomplete: str) -> list[str]:
        return _begun(incomplete, words)

    return complete


def _begun(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
