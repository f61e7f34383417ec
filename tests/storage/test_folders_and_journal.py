"""Folder names, folders, and a journal that survives being killed at any byte."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvprof.errors import Mismatch, OutputError
from kvprof.storage.atomic import write_atomically
from kvprof.storage.folders import output_folder, slug
from kvprof.storage.journal import Journal

# Folder names

IDS = st.one_of(
    st.text(st.characters(), max_size=30),
    st.text("ab/.-_ \\:~", max_size=12),
    st.from_regex(r"[A-Za-z0-9._-]{1,20}(/[A-Za-z0-9._-]{1,20}){0,3}", fullmatch=True),
)


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("gpt2", "gpt2"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB--SmolLM2-135M-Instruct"),
        ("org/name_v1.5", "org--name_v1.5"),
    ],
)
def test_a_hub_id_keeps_its_spelling(model_id: str, name: str) -> None:
    assert slug(model_id) == name


@pytest.mark.parametrize(
    "model_id",
    ["", ".", "..", "../..", "/", "//", "/etc/passwd", "a/../b", "a/..", "..\\..", "C:\\models\\x", "~/x", "a\nb",
     "a\0b", "\udcff", "é", "模型", "x" * 5_000, "org/" + "x" * 300, "/models/" + "x" * 300,
     "-rf", ".hidden", "a b", "a:b", "a*b"],
)  # fmt: skip
def test_an_odd_id_becomes_one_plain_folder_name(model_id: str, tmp_path: Path) -> None:
    name = slug(model_id)
    assert name.isascii()
    assert not set(name) & set('/\\:*?"<>|~ \0\n')
    assert name[0] not in ".-"
    assert len(name) <= 130
    (tmp_path / name).mkdir()
    assert os.listdir(tmp_path) == [name]


@given(IDS)
def test_no_id_leaves_the_outputs_folder(model_id: str) -> None:
    name = slug(model_id)
    assert name not in ("", ".", "..")
    assert Path("outputs", name).resolve().parent == Path("outputs").resolve()
    assert slug(model_id) == name


@given(IDS, IDS)
def test_distinct_ids_have_distinct_folders(one: str, other: str) -> None:
    assume(one != other)
    assert slug(one) != slug(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a/b", "a--b"),
        ("a/b", "a-b"),
        ("a-/b", "a--/b"),
        ("/models/llama", "/other/llama"),
        ("./llama", "llama"),
        ("/models/llama", "/models/llama/"),
        ("/models/Llama", "/models/llama"),
        ("org/" + "x" * 200, "org/" + "x" * 201),
        ("model.", "model"),
        ("model...", "model"),
        ("model .", "model"),
        ("a/b.", "a/b"),
        ("a//b", "a/b"),
        ("a--b", "a---b"),
    ],
)
def test_ids_that_look_alike_have_folders_that_differ_on_any_file_system(one: str, other: str) -> None:
    on_windows = [slug(model_id).lower().rstrip(". ") for model_id in (one, other)]
    assert on_windows[0] != on_windows[1]


def test_no_name_on_the_hub_is_the_folder_of_another_id() -> None:
    for model_id in ("/models/llama", "org/a--b", "a" * 300, "CON"):
        taken = slug(model_id)
        for other in (taken, taken.upper(), taken.replace("-", "/", 1), taken.replace("--", "/")):
            assert slug(other).lower() != taken.lower(), other


def test_a_hundred_thousand_folders_of_one_name_are_as_many() -> None:
    assert len({slug(f"/models/{number}/llama") for number in range(100_000)}) == 100_000


def test_folders_whose_names_differ_in_case_or_form_alone_are_two_on_any_file_system() -> None:
    for one, other in (("/Models/a", "/models/a"), ("/a/É", "/a/é"), ("/a/e\u0301", "/a/\u00e9"), ("./a", "./A")):
        assert slug(one).lower() != slug(other).lower()


@pytest.mark.parametrize("stem", ["con", "PRN", "aux", "Nul", "com1", "LPT9"])
@pytest.mark.parametrize("pattern", ["{}", "{}.gguf", "/models/{}", "/models/{}.tar.gz", "{}."])
def test_no_folder_has_the_name_of_a_windows_device(stem: str, pattern: str) -> None:
    name = slug(pattern.format(stem))
    assert name.split(".")[0].lower() != stem.lower()
    assert not name.endswith(".")


# Folders


def test_results_go_to_a_folder_of_the_model_below_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_folder("org/name", None) == Path("outputs/org--name")
    assert os.listdir(tmp_path) == []  # made with the first result


def test_a_named_folder_may_exist_and_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for _ in range(2):
        assert output_folder("org/name", tmp_path / "a" / "b") == tmp_path / "a" / "b"
        assert os.listdir(tmp_path / "a") == []


@pytest.mark.parametrize("place", ["file", "file/below", "/proc", "/proc/kvprof"])
def test_a_folder_that_cannot_be_written_is_refused_with_advice(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to .*\n.*--out DIR") as caught:
        output_folder("org/name", tmp_path / place)
    assert caught.value.exit_code == 1


def test_text_is_written_as_utf8_with_plain_newlines(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "a.txt", "é\n").read_bytes() == b"\xc3\xa9\n"


# The journal

SETTINGS = {"model": "org/name", "formats": ["int2g32", "rot2"], "tokens": 512, "pack": False, "out": None}
PIECES: dict[str, Any] = {
    "layer 0": {"key": 0.1, "value": 1e-300},
    "layer 1": [1, 2, {"é\n\u2028": None}],
    "settings": "a piece of this name, too",
    "": "",
    "layer 2": 1 / 3,
}


def journal(path: Path, restart: bool = False, **changed: Any) -> Journal:
    return Journal(path, {**SETTINGS, **changed}, restart)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Return the journal of a run that stopped after all its pieces."""
    path = tmp_path / "run.journal"
    with journal(path) as run:
        assert run.done == {}
        for key, result in PIECES.items():
            run.add(key, result)
    return path


def test_a_resumed_run_has_every_finished_piece(stopped: Path) -> None:
    with journal(stopped) as run:
        assert run.done == PIECES
        run.add("layer 3", 3)
    with journal(stopped) as run:
        assert run.done == {**PIECES, "layer 3": 3}


def test_a_piece_is_on_the_disk_when_add_returns(tmp_path: Path) -> None:
    path = tmp_path / "run.journal"
    with journal(path) as run:
        for count, (key, result) in enumerate(PIECES.items(), start=2):
            run.add(key, result)
            assert path.read_bytes().count(b"\n") == count


def test_a_piece_that_is_added_again_has_its_last_result(stopped: Path) -> None:
    with journal(stopped) as run:
        run.add("layer 0", "new")
    with journal(stopped) as run:
        assert run.done["layer 0"] == "new"


def test_results_are_the_same_in_the_run_that_made_them_and_in_the_one_that_resumes(tmp_path: Path) -> None:
    path = tmp_path / "run.journal"
    with journal(path) as run:
        run.add("layer 0", {1: (0.1, 0.2)})
        made = run.done
    with journal(path) as run:
        assert run.done == made == {"layer 0": {"1": [0.1, 0.2]}}


def test_settings_may_hold_tuples(tmp_path: Path) -> None:
    path = tmp_path / "run.journal"
    for _ in range(2):
        with journal(path, formats=("int2g32", "rot2")):
            pass


def test_a_run_that_is_killed_at_any_byte_resumes_with_the_pieces_that_were_whole(stopped: Path) -> None:
    raw = stopped.read_bytes()
    keys = list(PIECES)
    for size in range(len(raw) + 1):
        stopped.write_bytes(raw[:size])
        whole = max(raw[:size].count(b"\n") - 1, 0)  # the first line is the settings
        with journal(stopped) as run:
            assert list(run.done) == keys[:whole]
            for key in keys[whole:]:
                run.add(key, PIECES[key])
        assert stopped.read_bytes() == raw


def test_an_altered_piece_and_all_after_it_are_measured_again(stopped: Path) -> None:
    lines = stopped.read_bytes().splitlines(keepends=True)
    for at in range(0, len(lines[2]), 7):
        altered = bytearray(lines[2])
        altered[at] ^= 1
        stopped.write_bytes(b"".join([*lines[:2], bytes(altered), *lines[3:]]))
        with journal(stopped) as run:
            assert run.done == {"layer 0": PIECES["layer 0"]}


def test_a_line_without_end_is_not_read_into_memory(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvprof.storage.journal.LONGEST_LINE_BYTES", 2**16)
    whole = stopped.stat().st_size
    os.truncate(stopped, 2**33)  # a hole in the file, which takes no room
    tracemalloc.start()
    with journal(stopped) as run:
        assert run.done == PIECES
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert stopped.stat().st_size == whole


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\x00", b"not a journal\n", b"{}\n" * 9])
def test_a_journal_that_is_none_is_begun_anew(stopped: Path, content: bytes) -> None:
    stopped.write_bytes(content)
    with journal(stopped) as run:
        assert run.done == {}
        run.add("layer 0", 1)
    with journal(stopped) as run:
        assert run.done == {"layer 0": 1}


@pytest.mark.parametrize(
    ("field", "changed"),
    [("model", "org/other"), ("formats", ["int2g32"]), ("tokens", 513), ("pack", True), ("out", "x"), ("seed", 1)],
)
def test_a_run_of_other_settings_is_refused_and_the_field_named(stopped: Path, field: str, changed: Any) -> None:
    before = stopped.read_bytes()
    with (
        pytest.raises(Mismatch, match=rf"another {field}: it has .*, this command (.|\n)*--restart") as caught,
        journal(stopped, **{field: changed}),
    ):
        pass
    assert caught.value.exit_code == 4
    assert repr(changed) in str(caught.value)
    assert stopped.read_bytes() == before
    with journal(stopped) as run:  # the refusal has let go of the lock
        assert run.done == PIECES


def test_a_setting_that_is_absent_counts_as_null(stopped: Path) -> None:
    settings = {field: value for field, value in SETTINGS.items() if value is not None}
    with Journal(stopped, settings) as run:
        assert run.done == PIECES


def test_restart_begins_anew_whatever_the_settings_were(stopped: Path) -> None:
    with journal(stopped, restart=True, tokens=9) as run:
        assert run.done == {}
        run.add("layer 0", 0)
    with journal(stopped, tokens=9) as run:
        assert run.done == {"layer 0": 0}


def test_an_error_inside_the_run_keeps_its_pieces_and_lets_go_of_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.journal"
    with contextlib.suppress(KeyboardInterrupt), journal(path) as run:
        run.add("layer 0", 0)
        raise KeyboardInterrupt
    with journal(path) as run:
        assert run.done == {"layer 0": 0}


def test_a_run_that_fails_before_its_first_piece_leaves_nothing_and_a_stopped_one_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.journal"
    with pytest.raises(ValueError, match="too long"), journal(path):
        raise ValueError("too long")
    assert os.listdir(tmp_path) == []
    with contextlib.suppress(KeyboardInterrupt), journal(path):
        raise KeyboardInterrupt
    with pytest.raises(Mismatch), journal(path, tokens=9):
        pass


def test_nothing_is_left_of_a_run_that_removes_its_journal(tmp_path: Path) -> None:
    with journal(tmp_path / "run.journal") as run:
        run.add("layer 0", 0)
        run.remove()
    assert os.listdir(tmp_path) == []


@pytest.fixture
def holder(stopped: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield another process, which holds the journal."""
    script = (
        "import json, sys, pathlib\n"
        "from kvprof.storage.journal import Journal\n"
        "with Journal(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(stopped), json.dumps(SETTINGS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.fixture
def held(stopped: Path, holder: subprocess.Popen[bytes]) -> Path:
    return stopped


@pytest.mark.parametrize("restart", [False, True])
def test_a_journal_that_another_process_holds_is_refused_again_and_again(held: Path, restart: bool) -> None:
    before = held.read_bytes()
    for _ in range(3):
        with pytest.raises(OutputError, match="another kvprof is writing"), journal(held, restart):
            pass
    assert held.read_bytes() == before


def test_a_journal_whose_holder_was_killed_can_be_resumed(held: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.kill()  # as the kernel kills: nothing of it cleans up
    holder.wait()
    assert held.with_name("run.journal.lock").exists()
    with journal(held) as run:
        assert run.done == PIECES
    assert os.listdir(held.parent) == [held.name]


@pytest.mark.parametrize("place", ["file/run.journal", "folder", "/proc/kvprof/run.journal"])
def test_a_journal_that_cannot_be_written_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for restart in (False, True):
        with pytest.raises(OutputError, match="cannot write"), journal(tmp_path / place, restart):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_disk_that_fills_up_is_told_in_one_error_and_costs_no_finished_piece(tmp_path: Path) -> None:
    path = tmp_path / "run.journal"
    script = (
        "import json, pathlib, resource, sys\n"
        "from kvprof.errors import OutputError\n"
        "from kvprof.storage.journal import Journal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with Journal(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])) as run:\n"
        "        for layer in range(100):\n"
        "            run.add(str(layer), 'x' * 40)\n"
        "except OutputError as error:\n"
        "    print(len(run.done), error)\n"
    )
    command = [sys.executable, "-c", script, str(path), json.dumps(SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pieces, message = done.stdout.split(" ", 1)
    assert done.stderr == ""
    assert "Free some space" in message
    with journal(path) as run:
        assert len(run.done) == int(pieces) > 3


MAKE = """
import sys, time
from pathlib import Path
from kvprof.storage.folders import output_folder
time.sleep(max(0.0, float(sys.argv[1]) - time.time()))
for number in range(200):
    output_folder("m", Path(f"{number}/made"))
"""


def test_processes_that_try_the_same_new_folder_do_not_trip_each_other(tmp_path: Path) -> None:
    start = str(time.time() + 2)
    running = [subprocess.Popen([sys.executable, "-c", MAKE, start], cwd=tmp_path, stderr=-1) for _ in range(4)]
    assert [process.communicate()[1] for process in running] == [b""] * 4
