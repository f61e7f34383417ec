"""Who comes second to a result learns who has it; what a killed process left is taken over."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvprof.errors import OutputError
from kvprof.storage.atomic import replaced_when_whole, write_atomically
from kvprof.storage.journal import Journal
from kvprof.storage.lock import Lock
from kvprof.storage.processes import host_name, is_gone

HOLD = """
import pathlib, sys
from kvprof.storage.lock import Lock
sys.argv[0] = "/usr/bin/kvprof"
lock = Lock(pathlib.Path("run.lock"), "is writing here")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def holder(in_tmp: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield another process, which holds run.lock."""
    command = [sys.executable, "-c", HOLD, "gradients", "a model"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def refusal() -> str:
    with pytest.raises(OutputError) as caught:
        Lock(Path("run.lock"), "is writing here").acquire()
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_the_second_says_who_has_it_where_since_when_and_by_which_command(holder: subprocess.Popen[bytes]) -> None:
    for _ in range(3):  # whoever asks takes nothing from the answer
        said = refusal()
        assert re.fullmatch(
            rf"another kvprof is writing here: process {holder.pid} on {re.escape(host_name())}, "
            r"since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC: kvprof gradients 'a model'\n"
            rf"  Wait for it, stop it \(`kill {holder.pid}`; what it measured is kept\), or use another --out\.",
            said,
        )
    assert holder.stdin is not None
    holder.stdin.close()
    holder.wait()
    assert os.listdir() == []


def test_a_lock_whose_holder_was_killed_is_taken_over_and_names_the_new_one(holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.wait()
    assert sorted(os.listdir()) == ["run.lock", "run.lock.holder"]
    lock = Lock(Path("run.lock"), "is writing here")
    lock.acquire()
    assert f"process {os.getpid()} " in refusal()
    lock.release()
    assert os.listdir() == []


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"{", b"[]", b"null", b"7", b"[" * 100_000, b'{"pid": 1}',
     b'{"pid": "1", "host": "a", "since": "b", "command": "c"}', b'{"pid": 1, "host": 2, "since": "b", "command": "c"}',
     None],
)  # fmt: skip
def test_whatever_stands_beside_a_lock_the_refusal_is_plain(
    holder: subprocess.Popen[bytes], content: bytes | None
) -> None:
    beside = Path("run.lock.holder")
    beside.unlink() if content is None else beside.write_bytes(content)
    assert refusal() == "another kvprof is writing here; wait for it, or use another --out."


def test_a_holder_of_another_machine_is_named_and_one_that_is_gone_is_not(holder: subprocess.Popen[bytes]) -> None:
    beside = Path("run.lock.holder")
    told = json.loads(beside.read_text())
    beside.write_text(json.dumps(told | {"host": "node\n17", "command": "x" * 5000}))
    said = refusal()
    assert "on node 17, since" in said
    assert f"(`kill {holder.pid}` on node 17;" in said
    assert len(said) < 900
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    beside.write_text(json.dumps(told | {"pid": gone.pid}))
    assert refusal() == "another kvprof is writing here; wait for it, or use another --out."


def test_a_lock_holds_where_its_holder_cannot_be_written_down(in_tmp: Path) -> None:
    Path("run.lock.holder").mkdir()  # as little to be written to as a full disk
    (Path("run.lock.holder") / "file").touch()
    lock = Lock(Path("run.lock"), "is writing here")
    lock.acquire()
    assert refusal() == "another kvprof is writing here; wait for it, or use another --out."
    lock.release()


KILLED_WRITING = """
import os, pathlib, signal, sys
from kvprof.storage.atomic import replaced_when_whole
with replaced_when_whole(pathlib.Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_goes_with_the_next_one_and_a_living_one_keeps_its_own(in_tmp: Path) -> None:
    write_atomically("a.json", "old")
    for path in ("a.json", "b.json"):
        killed = subprocess.run([sys.executable, "-c", KILLED_WRITING, path], check=False)
        assert killed.returncode == -9
    assert Path("a.json").read_text() == "old"
    left = sorted(set(os.listdir()) - {"a.json"})
    assert len(left) == 2
    assert all(name.startswith(".") for name in left)
    with replaced_when_whole(Path("a.json")) as living:
        write_atomically("a.json", "new")
        assert living.exists()
        assert set(os.listdir()) == {"a.json", living.name, left[1]}
        living.write_text("newest")
    assert Path("a.json").read_text() == "newest"
    write_atomically("b.json", "b")
    assert sorted(os.listdir()) == ["a.json", "b.json"]


def test_which_processes_are_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert is_gone(host_name(), process.pid)
    assert not is_gone(host_name(), os.getpid())
    assert not is_gone(host_name(), 1)
    assert not is_gone("another", process.pid)
    for nonsense in (0, -1, 2**31, 10**30):  # 0 and -1 would mean groups of processes
        assert not is_gone(host_name(), nonsense)


@pytest.mark.parametrize("number", [28, 122])
def test_a_disk_that_is_full_by_any_name_is_told_with_what_to_do(
    number: int, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with Journal(Path("run.journal"), {}) as journal:
        journal.add("0", 0)
        with monkeypatch.context() as patch:
            patch.setattr("kvprof.storage.atomic.os.fsync", fail)
            for write in (lambda: journal.add("1", 1), lambda: write_atomically("a.json", "b")):
                with pytest.raises(OutputError, match=r"cannot write .*\n  Free some space .* is kept"):
                    write()
    assert sorted(os.listdir()) == ["run.journal"]
    with Journal(Path("run.journal"), {}) as journal:
        assert journal.done["0"] == 0
