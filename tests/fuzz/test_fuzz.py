"""No bytes make a reader raise what is not kvprof's own error, hang, or fill the memory: the fuzzers, for a while."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.mutations import mutated
from fuzz.readers import READERS, corpus
from fuzz.run import by_chance
from fuzz.watch import read_guarded

RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
INPUTS = 300
KEPT = [pytest.param(name, path, id=f"{name}-{path.name}") for name in READERS for path in corpus(name)]


@pytest.mark.parametrize("name", READERS)
def test_the_files_that_damage_starts_from_are_sound(name: str, tmp_path: Path) -> None:
    for content in READERS[name].seeds:
        (tmp_path / "input").write_bytes(content)
        READERS[name].read(tmp_path / "input")


@pytest.mark.parametrize(("name", "path"), KEPT)
def test_what_once_did_harm_does_none(name: str, path: Path, tmp_path: Path) -> None:
    for measures_memory in (False, True):
        assert read_guarded(READERS[name], tmp_path / "input", path.read_bytes(), measures_memory) is None


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    for number in range(INPUTS):
        content = mutated(reader.seeds, reader.words, random.Random(f"0:{name}:{number}"))
        wrong = read_guarded(reader, tmp_path / "input", content, measures_memory=number % 50 == 0)
        assert wrong is None, f"seed 0, input {number}: {wrong}"


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60, deadline=None, suppress_health_check=RELAXED)
@given(drawn=st.data())
def test_what_hypothesis_draws_is_read_or_refused(name: str, tmp_path: Path, drawn: st.DataObject) -> None:
    reader = READERS[name]
    seed = drawn.draw(st.sampled_from([*reader.seeds, b""]))
    pieces = st.one_of(st.binary(max_size=30), st.sampled_from([*reader.words, b"["]).flatmap(
        lambda word: st.integers(1, 200).map(lambda times: word * times)
    ))  # fmt: skip
    for _ in range(drawn.draw(st.integers(1, 3))):
        start = drawn.draw(st.integers(0, len(seed)))
        stop = start + drawn.draw(st.integers(0, 20))
        seed = seed[:start] + drawn.draw(pieces) + seed[stop:]
    assert read_guarded(reader, tmp_path / "input", seed) is None


RUN = [sys.executable, str(Path(__file__).parent / "run.py"), "--seed", "5", "--json"]


def test_the_command_says_what_it_did_and_an_input_can_be_made_again() -> None:
    done = subprocess.run(
        [*RUN, "--inputs", "12", "--only", "kvtuner", "--only", "index"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["what"], row["times"], row["failed"], row["seed"]) for row in rows] == [
        ("kvtuner", 12, 0, 5),
        ("index", 12, 0, 5),
    ]
    reader = READERS["kvtuner"]
    made = [mutated(reader.seeds, reader.words, random.Random("5:kvtuner:3")) for _ in range(2)]
    assert made[0] == made[1]


def test_harm_is_counted_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reads(path: Path) -> None:
        if len(path.read_bytes()) % 2:
            raise ZeroDivisionError("odd")

    monkeypatch.setitem(READERS, "index", replace(READERS["index"], read=reads))
    trial = by_chance("index", 5, range(40), math.inf, tmp_path, tmp_path / "kept")
    assert 0 < trial.failed < trial.times == 40
    kept = list((tmp_path / "kept/index").iterdir())
    assert 0 < len(kept) <= trial.failed
    assert all(len(path.read_bytes()) % 2 for path in kept)
    assert capsys.readouterr().err.count("ZeroDivisionError: odd") == trial.failed


def test_libfuzzer_chooses_inputs_where_it_is_installed() -> None:
    pytest.importorskip("atheris")
    done = subprocess.run(
        [*RUN, "--coverage", "--inputs", "500", "--only", "gguf"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["times"], row["failed"]) == (500, 0)
    assert row["seen"].endswith("branches reached")
