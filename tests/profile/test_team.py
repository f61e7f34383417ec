"""Several processes measure what one does, and fail as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import save_folder, save_text

from kvprof.errors import KvprofError, UsageError
from kvprof.profile.distributed import ProcessGroup, join_process_group
from kvprof.storage.processes import launched_rank, launched_size

MEASURE = "gradients model --data text.txt --pack --sequences 5 --sequence-length 24 --recent-tokens 4 --sink-tokens 1"
MORE = "--formats key:int2g8,value:int3g8 --batch-size 2"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_folder(tmp_path / "model")
    save_text(tmp_path / "text.txt")
    return tmp_path


def launch(place: Path, processes: int, command: str) -> subprocess.CompletedProcess[str]:
    """Start so many processes as torchrun does; of one, plainly."""
    many = ["torch.distributed.run", "--nproc_per_node", str(processes), "-m"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, "-m", *many, "kvprof", *command.split()],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "KVPROF_CACHE": str(place / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_and_three_processes_write_the_file_that_one_writes(place: Path) -> None:
    done = {number: launch(place, number, f"{MEASURE} {MORE} --out {number}") for number in (1, 2, 3)}
    for number, run in done.items():
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("written to") == 1
        assert sorted(file.name for file in (place / str(number)).iterdir()) == ["gradients.json"]
    files = {(place / str(number) / "gradients.json").read_bytes() for number in done}
    assert len(files) == 1


def test_an_error_ends_all_processes_with_one_message(place: Path) -> None:
    done = launch(place, 2, f"{MEASURE} --formats key:int2g512 --out out")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "int2g512" in done.stderr
    assert not (place / "out").exists()


def test_a_command_that_cannot_be_shared_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = launch(place, 1, "norms model")
    assert done.returncode == 2
    assert "`kvprof norms` runs in one process" in done.stderr


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")])
def test_every_launcher_says_which_process_this_is(names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launched_rank(), launched_size()) == (0, 1)
    for name, number in zip(names, ("2", "3"), strict=True):
        monkeypatch.setenv(name, number)
    assert (launched_rank(), launched_size()) == (0, 1)  # with nowhere to meet, each stands alone
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (launched_rank(), launched_size()) == (2, 3)


def test_a_process_alone_is_a_team() -> None:
    group, device = join_process_group("cpu")
    assert (group.rank, group.size, group.leads, device) == (0, 1, True, "cpu")
    assert group.together(lambda: 5) == [5]
    assert group.first(lambda: 5) == group.lead(lambda: 5) == group.each(lambda: 5) == 5
    with pytest.raises(KvprofError):
        group.each(lambda: 1 if not group.leads else _fail())


def _fail() -> int:
    raise UsageError("no")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_piece_has_its_turn_once_and_all_take_as_many(size: int) -> None:
    work = list(range(10))
    turns = [list(ProcessGroup(rank, size).turns(work)) for rank in range(size)]
    assert len({len(taken) for taken in turns}) == 1
    assert sorted(piece for taken in turns for piece in taken if piece is not None) == work
