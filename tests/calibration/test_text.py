"""Where the rows come from, which of them are taken, and what is said when there are none."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pyarrow.parquet
import pytest

from kvprof.calibration.text import SPLITS, is_hub_dataset, open_text
from kvprof.errors import CalibrationError, UsageError

ROWS = [f"row {number}: the quick brown fox, the lazy dog" for number in range(40)]


def write_txt(path: Path, rows: list[str]) -> None:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": n, "text": row}) + "\n" for n, row in enumerate(rows)), encoding="utf-8")


def write_json(path: Path, rows: list[str]) -> None:
    path.write_text(json.dumps([{"text": row} for row in rows]), encoding="utf-8")


def write_csv(path: Path, rows: list[str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], *([row, "x"] for row in rows)])


def write_parquet(path: Path, rows: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "id": list(range(len(rows)))}), path)


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    ".txt": write_txt,
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_every_kind_of_file_gives_its_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = [*ROWS, 'ünïcödé, «quotes» and "commas"', "zwölf"]
    WRITERS[suffix](path, rows)
    source = open_text(str(path))
    assert sorted(source.rows) == sorted(rows)
    assert (source.name, source.split, source.packed) == (str(path), "all", False)


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_the_splits_of_a_file_are_disjoint_and_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    calibration, held_out = (set(open_text(str(path), split).rows) for split in SPLITS)
    assert calibration | held_out == set(ROWS)
    assert not calibration & held_out
    assert len(calibration) > len(held_out) > 0


def test_a_row_stays_in_its_split_whatever_stands_around_it(tmp_path: Path) -> None:
    write_txt(tmp_path / "all.txt", ROWS)
    write_jsonl(tmp_path / "half.jsonl", ROWS[::2])
    for split in SPLITS:
        half, whole = (set(open_text(str(tmp_path / name), split).rows) for name in ("half.jsonl", "all.txt"))
        assert half == whole & set(ROWS[::2])


def test_the_splits_of_the_built_in_text_are_disjoint_and_whole() -> None:
    calibration, held_out = (list(open_text(split=split).rows) for split in SPLITS)
    assert not set(calibration) & set(held_out)
    assert sorted(calibration + held_out) == sorted(topics.values()) == sorted(open_text(split="all").rows)
    assert 2 < len(calibration) / len(held_out) < 5
    assert open_text().split == "calibration"
    assert open_text().packed


def test_a_seed_decides_the_order_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.txt")
    write_txt(Path(path), ROWS)
    for data in ("builtin", path):
        one, again, other = (list(open_text(data, seed=seed).rows) for seed in (1, 1, 2))
        assert one == again
        assert one != other
        assert sorted(one) == sorted(other)


def test_another_process_takes_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    write_txt(path, ROWS)
    script = (
        "import sys, json; from kvprof.calibration.text import open_text\n"
        "print(json.dumps([list(open_text(d, 'held-out', 3).rows)[:9] for d in ('builtin', sys.argv[1])]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    result = subprocess.run(
        [sys.executable, "-c", script, path], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == [
        list(islice(open_text(data, "held-out", 3).rows, 9)) for data in ("builtin", str(path))
    ]


def test_blank_rows_and_missing_ones_are_left_out(tmp_path: Path) -> None:
    write_txt(tmp_path / "rows.txt", ["one", "", "   ", "\t", "two"])
    assert sorted(open_text(str(tmp_path / "rows.txt")).rows) == ["one", "two"]
    rows = [{"text": None, "title": "a title"}, {"text": "one", "title": "another"}, {"text": " ", "title": "third"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for seed in range(4):  # whichever row comes first
        assert list(open_text(str(tmp_path / "rows.jsonl"), seed=seed).rows) == ["one"]


@pytest.mark.parametrize("column", ["content", "prompt", "document", "whatever"])
def test_the_column_of_text_is_found_by_its_usual_name_or_for_want_of_another(tmp_path: Path, column: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": 1, column: "one"}) + "\n" + json.dumps({"id": 2, column: None}))
    for seed in range(4):
        assert list(open_text(str(path), seed=seed).rows) == ["one"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"headline": "a cat sat", "summary": "on a mat"}, r"found headline, summary\.\n.*--column headline"),
        ({"id": 1}, r"found id \(numbers\)\.\n.*None of them is text"),
    ],
    ids=["two", "none"],
)
def test_rows_without_one_column_of_text_are_refused_with_their_columns(
    tmp_path: Path, row: dict[str, object], words: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(CalibrationError, match=f"which column is text; {words}"):
        list(open_text(str(path)).rows)


def test_a_text_column_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": ["a", "list"], "title": "one"}))
    with pytest.raises(CalibrationError, match="'text' holds list, not text"):
        list(open_text(str(tmp_path / "rows.jsonl")).rows)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".txt", b"\xff\xfe\xfa latin or worse"),
        (".jsonl", b'{"text": "one"}\n{"text": \n'),
        (".jsonl", b"no json"),
        (".json", b"[1, 2"),
        (".csv", b'text,label\n"one'),
        (".csv", b"text\none,two,three\nfour,five,six,seven\n"),
        (".parquet", b"PAR1 and nothing else"),
        (".parquet", b"x"),
    ],
)
def test_a_broken_file_is_one_message_that_names_it(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"broken\{suffix}") as caught:
        list(open_text(str(path)).rows)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_a_file_that_is_missing_or_empty_is_one_message(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    with pytest.raises(CalibrationError, match="no such file"):
        open_text(str(path))
    path.touch()
    with pytest.raises(CalibrationError, match="the file is empty"):
        open_text(str(path))


@pytest.mark.parametrize("name", ["{0}/absent", "./absent", "../absent", "~/absent", "{0}/absent/", "./a/b.data"])
def test_a_path_that_is_not_there_is_no_dataset_of_the_hub(
    in_tmp: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(in_tmp))
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments) or [])
    with pytest.raises(CalibrationError, match=r"(absent|b\.data)/?: no such file or folder\.\n"):
        open_text(name.format(in_tmp))
    assert not is_hub_dataset(name.format(in_tmp))
    assert asked == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("wide.csv", "text" + ",x" * 20_000 + "\n" + "a cat" + ",1" * 20_000 + "\n"),
        ("wide.jsonl", json.dumps({f"k{number}": "x" for number in range(20_000)}) + "\n"),
    ],
)
def test_a_table_of_thousands_of_columns_is_refused_at_once(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=r"its rows have 20\d\d\d columns; .* 1000 at most"):
        list(open_text(str(tmp_path / name)).rows)


def test_many_rows_on_one_line_and_text_about_tables_are_no_columns(tmp_path: Path) -> None:
    rows = [{"text": f'row {number}: {{"a": 1, "b": 2}}'} for number in range(1500)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": '"a": ' * 1500}) + "\n")
    assert len(list(open_text(str(tmp_path / "rows.json")).rows)) == 1500
    assert next(open_text(str(tmp_path / "text.jsonl")).rows).startswith('"a": "a": ')


def test_a_file_of_another_kind_says_which_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.docx").touch()
    with pytest.raises(UsageError, match=r"\.txt, .*\.jsonl"):
        open_text(str(tmp_path / "rows.docx"))
    with pytest.raises(CalibrationError, match=r"holds no file of text.*\n.*\.txt, .*\.jsonl"):
        open_text(str(tmp_path))


@pytest.mark.parametrize("name", ["rows[1].txt", "a*b?.txt", "spa ce.txt", "ümläut.txt", "UPPER.TXT", "50%.txt"])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    write_txt(tmp_path / name, ROWS)
    write_txt(tmp_path / "rows1.txt", ["a file that a pattern might match instead"])
    assert sorted(open_text(str(tmp_path / name)).rows) == sorted(ROWS)


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_reading_a_file_asks_the_network_for_nothing(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments) or [])
    WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS)
    assert len(list(open_text(str(tmp_path / f"rows{suffix}")).rows)) == len(ROWS)
    assert asked == []


def test_a_file_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_txt(tmp_path / "rows.txt", ROWS)
    assert len(list(open_text("~/rows.txt").rows)) == len(ROWS)


@pytest.mark.parametrize("word", ["bultin", "built-in", "builtins", "Builtin"])
def test_a_misspelt_builtin_is_offered(word: str) -> None:
    with pytest.raises(UsageError, match="did you mean 'builtin'"):
        open_text(word)


@pytest.mark.parametrize("data", ["builtin", "rows.txt"])
def test_a_misspelt_split_is_offered(data: str, in_tmp: Path) -> None:
    write_txt(in_tmp / "rows.txt", ROWS)
    with pytest.raises(UsageError, match="did you mean 'held-out'"):
        open_text(data, split="heldout")


@pytest.mark.parametrize("name", ["org/no-such-dataset", "wikitext", "a\0b", "x" * 5000, "~nobody-of-this-name"])
def test_a_dataset_that_cannot_be_had_is_one_message_that_offers_the_built_in_text(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"cannot read calibration text from .*\n.*builtin"):
        list(open_text(name).rows)
