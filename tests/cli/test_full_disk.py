"""Disks that are full or cannot be written, on a small one of the test's own, where mounting is permitted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import save_folder, save_text
from test_commands import run

SMALL = "--data text.txt --pack --sequences 24 --sequence-length 16".split()  # noqa: SIM905
FORMATS = "--recent-tokens 2 --sink-tokens 1 --formats key:int2g4,value:int3g8".split()  # noqa: SIM905
MEASURE = {
    "norms": ["norms", "model"],
    "gradients": ["gradients", "model", *SMALL, *FORMATS],
    "spectra": ["spectra", "model", *SMALL],
    "divergence": ["divergence", "model", *SMALL, *FORMATS],
    "evaluate": ["evaluate", "out/plan.json", "--model", "model", *SMALL, "--no-rivals"],
}
WRITE = {
    "allocate": ["allocate", "--scores", "out/gradients.json", "--budget", "8.5", *FORMATS, "--out", "disk/plan.json"],
    "report": ["report", "out", "--out", "disk/page.html"],
    "plot": ["plot", "norms", "--model", "out", "--out", "disk"],
    "plot-svg": ["plot", "norms", "--model", "out", "--format", "svg", "--out", "disk"],
}


@pytest.fixture
def place(in_tmp: Path) -> Path:
    save_folder(in_tmp / "model")
    save_text(in_tmp / "text.txt", rows=24)
    for command in ([*MEASURE["norms"], "--out", "out"], [*MEASURE["gradients"], "--out", "out"]):
        assert run(*command).exit_code == 0
    result = run(*WRITE["allocate"][:-1], "out/plan.json")
    assert result.exit_code == 0, result.output
    return in_tmp


@pytest.fixture
def disk(place: Path) -> Iterator[Path]:
    """Yield a disk of 64 KiB."""
    folder = place / "disk"
    folder.mkdir()
    if mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)):
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def mount(*words: str) -> int:
    try:
        return subprocess.run(["mount", *words], capture_output=True, check=False).returncode
    except FileNotFoundError:
        return 1


def fill(disk: Path, left_bytes: int) -> Path:
    """Leave so little of the disk."""
    status = os.statvfs(disk)
    full = disk / "others"
    full.write_bytes(b"x" * (status.f_bavail * status.f_frsize - left_bytes))
    return full


def test_a_disk_that_is_full_is_told_and_what_was_measured_is_kept(disk: Path) -> None:
    expected = {name: run(*command, "--out", "whole") for name, command in MEASURE.items()}
    assert all(result.exit_code == 0 for result in expected.values())
    for name, command in MEASURE.items():
        full = fill(disk, 4096)
        result = run(*command, "--out", "disk")
        journals = {path.name: path.read_bytes() for path in disk.glob("*.journal")}
        if result.exit_code != 0:
            assert result.exit_code == 1, result.output
            said = " ".join(result.output.split())
            assert "No space left on device" in said
            assert "Free some space and give the same command again: what is measured is kept." in said
            assert sorted(os.listdir(disk)) == sorted([*journals, full.name])
        full.unlink()
        pieces = sum(max(0, raw.count(b"\n") - 1) for raw in journals.values())
        again = run(*command, "--out", "disk")
        assert again.exit_code == 0, again.output
        assert ("went on with a stopped run" in again.output) == (pieces > 0), name
        (written,) = disk.iterdir()
        assert written.read_bytes() == Path("whole", written.name).read_bytes()
        written.unlink()


@pytest.mark.parametrize("name", WRITE)
def test_a_result_that_does_not_fit_the_disk_leaves_the_old_one(name: str, disk: Path) -> None:
    place = next(Path(word) for word in reversed(WRITE[name]) if word.startswith("disk"))
    target = place if place.suffix else disk / f"norms.{'svg' if name == 'plot-svg' else 'png'}"
    target.write_text("old")
    full = fill(disk, 0)
    result = run(*WRITE[name])
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.output
    assert "Free some space" in result.output
    assert target.read_text() == "old"
    assert sorted(os.listdir(disk)) == sorted([target.name, full.name])


def test_a_folder_on_a_disk_that_cannot_be_written_is_refused_before_anything_is_measured(disk: Path) -> None:
    (disk / "norms.json").write_bytes(Path("out/norms.json").read_bytes())
    assert mount("-o", "remount,ro", str(disk)) == 0
    measure = {name: [*words, "--out", "disk"] for name, words in MEASURE.items()}
    for name, command in {**measure, **WRITE}.items():
        result = run(*command)
        assert result.exit_code == 1, f"{name}: {result.output}"
        assert "Read-only file system" in result.output
        assert "--out DIR" in result.output
        assert "estimate" not in result.output
    assert os.listdir(disk) == ["norms.json"]


def test_scores_on_a_disk_that_cannot_be_written_are_not_calibrated(disk: Path) -> None:
    (disk / "gradients.json").write_bytes(Path("out/gradients.json").read_bytes())
    assert mount("-o", "remount,ro", str(disk)) == 0
    result = run("calibrate", "out/plan.json", "--model", "model", "--scores", "disk/gradients.json")
    assert result.exit_code == 1
    assert "Read-only file system" in result.output


def test_a_recipe_on_a_full_disk_goes_on_when_there_is_room(disk: Path) -> None:
    Path("mine.toml").write_text('model = "model"\nout = "disk"\n[norms]\n[gradients]\ndata = "text.txt"\n')
    full = fill(disk, 4096)
    result = run("run", "mine.toml")
    assert result.exit_code == 1, result.output
    assert "Free some space" in result.output
    full.unlink()
    assert run("run", "mine.toml", "--dry-run").exit_code == 0
    assert not [name for name in os.listdir(disk) if name.startswith(".")]
