"""What is published: the source archive, the wheel that is built from it, and kvprof as installed from that wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

from kvprof import __version__

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Built:
    """Both archives, and the paths in them."""

    wheel: Path
    source: Path
    in_wheel: frozenset[str]
    in_source: frozenset[str]


def hatchling(folder: Path, target: str, out: Path) -> Path:
    """Build one archive of a folder, without a network or an environment of its own."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (archive,) = out.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """As pip builds a release: the source archive of the checkout, and the wheel of what that archive holds."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("built")
    source = hatchling(ROOT, "sdist", out)
    with tarfile.open(source) as archive:
        archive.extractall(out / "unpacked", filter="data")
        in_source = {member.name.partition("/")[2] for member in archive.getmembers()}
    (unpacked,) = (out / "unpacked").iterdir()
    wheel = hatchling(unpacked, "wheel", out)
    return Built(wheel, source, frozenset(zipfile.ZipFile(wheel).namelist()), frozenset(in_source))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with that wheel, which sees the libraries of this one, and not the checkout."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(built.wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    (site,) = folder.rglob("site-packages")
    # Paths of a .pth file are searched last, and their own .pth files, of which one names the checkout, are not read.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    return python.parent


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    return subprocess.check_output([str(word) for word in command], cwd=cwd, text=True, env=environment)


def metadata(built: Built) -> Metadata:
    (name,) = (name for name in built.in_wheel if name.endswith(".dist-info/METADATA"))
    return Metadata.from_email(zipfile.ZipFile(built.wheel).read(name), validate=True)


def test_the_wheel_holds_every_module_and_nothing_beside_the_package(built: Built) -> None:
    sources = (path for pattern in ("*.py", "*.pyi", "py.typed") for path in (ROOT / "kvprof").rglob(pattern))
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= built.in_wheel
    assert {"kvprof/py.typed", "kvprof/__init__.pyi"} <= built.in_wheel
    assert {name.split("/")[0] for name in built.in_wheel} == {"kvprof", f"kvprof_bits-{__version__}.dist-info"}
    assert not [name for name in built.in_wheel if name.endswith((".pyc", ".json", ".safetensors", ".gguf"))]


def test_the_wheel_holds_every_recipe_and_the_licence(built: Built) -> None:
    recipes = {path.name for path in (ROOT / "recipes").glob("*.toml")}
    assert recipes == {Path(name).name for name in built.in_wheel if name.endswith(".toml")}
    (licence,) = (name for name in built.in_wheel if name.endswith("/LICENSE"))
    assert zipfile.ZipFile(built.wheel).read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_source_archive_holds_what_builds_and_no_tests_or_results(built: Built) -> None:
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= built.in_source
    tops = {name.split("/")[0] for name in built.in_source if name}
    assert tops <= {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", ".gitignore", "kvprof", "recipes"}


def test_the_metadata_is_valid_and_says_what_pyproject_does(built: Built) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = metadata(built)
    assert (found.name, str(found.version)) == (project["name"], __version__)
    assert found.license_expression == "MIT"
    assert found.description_content_type == "text/markdown"
    assert str(found.requires_python) == project["requires-python"]
    assert {name.replace("_", "-") for name in found.provides_extra or ()} == set(project["optional-dependencies"])
    needed = {one.name for one in found.requires_dist or () if one.marker is None}
    assert needed == {Requirement(text).name for text in project["dependencies"] if ";" not in text}


def test_the_wheel_declares_its_command_and_its_model_for_lm_eval(built: Built) -> None:
    (name,) = (name for name in built.in_wheel if name.endswith("/entry_points.txt"))
    declared = zipfile.ZipFile(built.wheel).read(name).decode()
    for group, target in [
        ("console_scripts", "kvprof.__main__:main"),
        ("lm_eval.models", "kvprof.evaluate.harness_model:HarnessModel"),
        ("torch.backends", "kvprof.evaluate.harness:register_where_wanted"),
    ]:
        assert f"[{group}]\nkvprof = {target}\n" in declared


def test_kvprof_runs_as_installed_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    place = run(installed / "python", "-c", "import kvprof; print(kvprof.__file__)", cwd=tmp_path)
    assert not Path(place.strip()).is_relative_to(ROOT)
    assert Path(place.strip()).is_relative_to(installed.parent)
    assert __version__ in run(installed / "kvprof", "--version", cwd=tmp_path)
    assert "allocate" in run(installed / "kvprof", "--help", cwd=tmp_path)
    assert "kvprof.plan/1" in run(installed / "kvprof", "schema", "plan", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_found_as_installed(installed: Path, tmp_path: Path) -> None:
    script = "from kvprof.recipes.shipped import shipped_recipes; print(*sorted(shipped_recipes()))"
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
    assert run(installed / "python", "-c", script, cwd=tmp_path).split() == recipes


def test_type_checkers_find_the_types_as_installed(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from kvprof import BitPlan, Scores, allocate\n"
        "import kvprof\n"
        "def plan(scores: Scores) -> BitPlan:\n"
        "    return allocate(scores, 2.5)\n"
        "reveal_type(kvprof.allocate(Scores.load('norms.json'), budget=2.5))\n"
        "reveal_type(kvprof.norms('demo'))\n"
        "kvprof.evaluate('plan.json', rivls=False)\n"
    )
    heavy = [f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "transformers", "numpy", "pydantic")]
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\nincremental = False\n" + "".join(heavy))
    options = ["--python-executable", str(installed / "python"), "user.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    lines = [line.partition("user.py:")[2] for line in done.stdout.splitlines() if "user.py:" in line]
    assert lines[0] == '5: note: Revealed type is "kvprof.records.plan.BitPlan"', done.stdout
    assert lines[1] == '6: note: Revealed type is "kvprof.records.scores.Scores"'
    assert lines[2].startswith('7: error: Unexpected keyword argument "rivls" for "evaluate"')
    assert len([line for line in lines if "error" in line]) == 1
