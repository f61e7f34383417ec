"""Who imports whom, functions' own imports included: no circle, and nothing that rows in pyproject.toml leave open."""

from __future__ import annotations

from pathlib import Path

import grimp
import pytest

Imports = dict[str, set[str]]
"""A module to the modules that it imports directly, wherever in its file; of other packages their names alone."""


def imports_of(package: str) -> Imports:
    graph = grimp.build_graph(
        package, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circle(imports: Imports) -> list[str] | None:
    """Return modules of which each imports the next, and the last the first; None where there are none."""
    left = dict(imports)
    while loose := [module for module, found in left.items() if not found & left.keys()]:
        for module in loose:
            del left[module]
    if not left:
        return None
    path = [min(left)]  # whatever is left imports something that is left, so that a walk comes back
    while (found := min(left[path[-1]] & left.keys())) not in path:
        path.append(found)
    return path[path.index(found) :]


def within(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"{place}.")


@pytest.fixture(scope="module")
def imports() -> Imports:
    return imports_of("kvprof")


def test_no_module_imports_itself_by_way_of_others(imports: Imports) -> None:
    assert len(imports) > 100
    assert circle(imports) is None


@pytest.mark.parametrize(
    ("room", "other"),
    [
        ("kvprof.report", "kvprof.allocate"),
        ("kvprof.report", "kvprof.targets"),
        ("kvprof.report", "kvprof.analysis"),
        ("kvprof.report", "kvprof.recipes"),
        ("kvprof.runtime", "kvprof.calibration"),
        ("kvprof.runtime", "kvprof.models.checkpoint.hub"),
        ("kvprof.runtime", "datasets"),
    ],
)
def test_rooms_that_no_row_keeps_apart_do_not_know_each_other(imports: Imports, room: str, other: str) -> None:
    assert other in imports
    met = [(module, found) for module in imports if within(module, room) for found in imports[module]]
    assert [f"{module} -> {found}" for module, found in met if within(found, other)] == []


def test_what_prints_needs_no_numpy(imports: Imports) -> None:
    """Not even by way of the records that turn samples into scores: loading numpy takes longer than most commands."""
    reached: set[str] = set()
    found = {module for module in imports if within(module, "kvprof.report")}
    while found:
        reached |= found
        found = set().union(*(imports[module] for module in found)) - reached
    assert "kvprof.records.scores" in reached
    assert "numpy" not in reached


def test_a_circle_of_functions_imports_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "__init__": "",
        "a": "def call():\n    from ringed import b",
        "b": "import ringed.c",
        "c": "def call():\n    from ringed.a import call",
        "d": "import ringed.a",
    }
    write(tmp_path / "ringed", modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert circle(imports_of("ringed")) == ["ringed.a", "ringed.b", "ringed.c"]


def test_an_import_for_types_alone_closes_no_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from typed import b"
    write(tmp_path / "typed", {"__init__": "", "a": types, "b": "import typed.a"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert circle(imports_of("typed")) is None


def write(folder: Path, modules: dict[str, str]) -> None:
    folder.mkdir()
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text + "\n")
