"""Which versions were installed, and are the lower bounds in pyproject.toml what a resolver takes? Run by versions.sh.

Prints each dependency with its bound and what was installed. Where those are the lowest, fails for a bound that is
lower than any version that the other dependencies allow, and so was never run.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib


def bounds(pyproject: Path) -> dict[str, Version]:
    """Return the lower bound of each dependency that this environment needs, the extras' too."""
    project = tomllib.loads(pyproject.read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found: dict[str, Version] = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        lowest = next(Version(one.version) for one in requirement.specifier if one.operator in (">=", "=="))
        if found.setdefault(requirement.name, lowest) != lowest:
            raise SystemExit(f"{requirement.name} has two lower bounds: {found[requirement.name]} and {lowest}")
    return found


def main() -> None:
    unreachable = []
    for name, lowest in bounds(Path(sys.argv[1])).items():
        try:
            installed = Version(metadata.version(name))
        except metadata.PackageNotFoundError:  # of an extra for weights that no test loads
            print(f"{name:20} >= {lowest!s:10} not installed")
            continue
        print(f"{name:20} >= {lowest!s:10} {installed}")
        if sys.argv[2] == "lowest" and (installed.major, installed.minor) != (lowest.major, lowest.minor):
            unreachable.append(f"{name}: declared {lowest}, the lowest that resolves is {installed}")
    if unreachable:
        raise SystemExit("bounds that no resolver takes:\n  " + "\n  ".join(unreachable))


if __name__ == "__main__":
    main()
