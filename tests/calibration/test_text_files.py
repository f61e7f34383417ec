"""Text in several files, compressed files and saved data sets: the rows that the writers of those formats wrote."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from kvprof.calibration.chat import Chat, text_of
from kvprof.calibration.files import shuffled
from kvprof.calibration.text import SPLITS, _streamed, open_text
from kvprof.errors import CalibrationError, KvprofError, UsageError

ROWS = [f"row {number}: the quick brown fox, the lazy dog, ümläut" for number in range(40)]


def rows_of(name: str | Path, split: str | None = None, **how: object) -> list[str]:
    return sorted(str(row) for row in open_text(str(name), split, **how).rows)  # type: ignore[arg-type]


def jsonl(rows: list[str]) -> bytes:
    return "".join(json.dumps({"id": f"r{n}", "text": row}) + "\n" for n, row in enumerate(rows)).encode()


def write_parquet(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "id": list(range(len(rows)))}), path)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_a_compressed_file_holds_the_rows_that_were_compressed(tmp_path: Path, suffix: str, compression: str) -> None:
    content = {
        ".txt": "\n".join(ROWS).encode(),
        ".jsonl": jsonl(ROWS),
        ".json": json.dumps([{"text": row} for row in ROWS], indent=1).encode(),
        ".csv": ("text,n\n" + "".join(f'"{row}",1\n' for row in ROWS)).encode(),
        ".tsv": ("n\ttext\n" + "".join(f"1\t{row}\n" for row in ROWS)).encode(),
    }[suffix]
    path = tmp_path / f"rows{suffix}{compression}"
    compress = COMPRESSORS[compression]
    half = len(content) // 2
    path.write_bytes(compress(content[:half]) + compress(content[half:]))  # as parts that were joined
    assert rows_of(path) == sorted(ROWS)
    path.write_bytes(compress(content)[:-9])
    with pytest.raises(CalibrationError, match=f"rows{suffix}{compression}"):
        rows_of(path)


@pytest.mark.parametrize("suffix", [".md", ".raw", ".test.raw", ".MD"])
def test_prose_by_other_endings_is_text_by_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"wiki{suffix}"
    path.write_text("\n".join(ROWS), encoding="utf-8")
    assert rows_of(path) == sorted(ROWS)


@pytest.mark.parametrize("number", [7, 9_999, 10_000, 10_001, 27_000])
def test_rows_come_in_the_order_that_datasets_gives_them(number: int) -> None:
    stream = datasets.IterableDataset.from_generator(lambda: ({"row": row} for row in range(number)))
    for seed in (0, 5):
        expected = [row["row"] for row in stream.shuffle(seed=seed, buffer_size=10_000)]
        assert list(shuffled(iter(range(number)), seed)) == expected


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_file_keeps_the_order_in_which_datasets_reads_it(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        write_parquet(path, ROWS)
    else:
        path.write_bytes({".txt": "\n".join(ROWS).encode(), ".jsonl": jsonl(ROWS)}.get(suffix) or _csv(ROWS))
    builder = {".txt": "text", ".jsonl": "json"}.get(suffix, suffix[1:])
    stream = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
    expected = [row["text"] for row in stream.shuffle(seed=3, buffer_size=10_000)]
    assert list(open_text(str(path), seed=3).rows) == expected


def _csv(rows: list[str]) -> bytes:
    return ("text\n" + "".join(f'"{row}"\n' for row in rows)).encode()


@pytest.mark.parametrize(
    "content",
    [
        "id;text\n1;a cat, on a mat\n2;a dog\n",
        'id;text\r\n1;"a cat, on a mat"\r\n2;a dog\r\n',
        '"id";"text"\n"1";"a cat, on a mat"\n"2";"a dog"\n',
        '"the id, or so";"text"\n1;a cat, on a mat\n2;a dog\n',
        "id\ttext\n1\ta cat, on a mat\n2\ta dog\n",
        "id|text\n1|a cat, on a mat\n2|a dog\n",
        "sep=;\nid;text\n1;a cat, on a mat\n2;a dog\n",
        "\ufeffid;text\n1;a cat, on a mat\n2;a dog\n",
        'id,text\n1,"a cat, on a mat"\n2,a dog\n',
        'text\n"a cat, on a mat"\na dog\n',
        ',text\n0,"a cat, on a mat"\n1,a dog\n',
    ],
)
def test_a_table_is_cut_where_its_first_line_is(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.csv").write_text(content, encoding="utf-8", newline="")
    assert rows_of(tmp_path / "rows.csv") == ["a cat, on a mat", "a dog"]


def test_semicolons_and_bars_within_text_cut_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na cat; a mat | a dog\n")
    assert rows_of(tmp_path / "rows.csv") == ["a cat; a mat | a dog"]
    (tmp_path / "rows.tsv").write_text("n\ttext; of cats\n1\ta cat; a mat\n")
    assert rows_of(tmp_path / "rows.tsv", column="text; of cats") == ["a cat; a mat"]
    (tmp_path / "rows.tsv").write_text("id,text\n1,a cat; a mat\n")
    assert rows_of(tmp_path / "rows.tsv") == ["a cat; a mat"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,id,text\na cat,1,a dog\n")
    table = pyarrow.table([pyarrow.array(["a cat"]), pyarrow.array(["a dog"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        with pytest.raises(CalibrationError, match=rf"{name} has the column 'text' 2 times\.\n.*name of its own"):
            rows_of(tmp_path / name)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".csv", ".tsv", ".jsonl", ".json", ".txt.gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark_is_no_text(tmp_path: Path, suffix: str, encoding: str) -> None:
    content = (json.dumps({"text": "a cat"}) if "json" in suffix else "text\na cat") + "\n"
    encoded = content.encode(encoding)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(encoded) if suffix.endswith(".gz") else encoded)
    with pytest.raises(CalibrationError, match=r"line 1: holds NUL characters.*\n.*UTF-8"):
        rows_of(path)


def test_json_is_read_however_it_is_laid_out(tmp_path: Path) -> None:
    entries = [{"text": row} for row in ROWS]
    for content in (
        json.dumps(entries),
        json.dumps(entries, indent=2),
        json.dumps(ROWS),
        "\n\n".join(map(json.dumps, entries)),
        "\n".join(map(json.dumps, ROWS)),
        "\ufeff" + "\r\n".join(map(json.dumps, entries)),
    ):
        for suffix in (".json", ".jsonl"):
            (tmp_path / f"rows{suffix}").write_text(content, encoding="utf-8")
            assert rows_of(tmp_path / f"rows{suffix}") == sorted(ROWS)
    single = tmp_path / "single.json"
    single.write_text(json.dumps({"text": "one\ntwo"}, indent=2))
    assert rows_of(single) == ["one\ntwo"]


def test_a_list_of_messages_is_a_row_a_line_an_entry_or_all_of_a_file(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"cat {n}?"}, {"role": "assistant", "content": "a mat"}] for n in range(3)]
    turns = sorted(Chat((("user", f"cat {n}?"), ("assistant", "a mat"))).text for n in range(3))
    path = tmp_path / "rows.jsonl"
    for content in ("\n".join(map(json.dumps, chats)), json.dumps(chats), json.dumps(chats, indent=1)):
        path.write_text(content)
        assert sorted(text_of(row) for row in open_text(str(path)).rows) == turns
    path.write_text(json.dumps(chats[0]))
    assert [text_of(row) for row in open_text(str(path)).rows] == ["user: cat 0?\n\nassistant: a mat"]
    rows = [{"role": "page", "content": row, "id": number} for number, row in enumerate(ROWS)]
    path.write_text(json.dumps(rows))
    assert rows_of(path) == sorted(ROWS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "one"}\n{"text": "two"\n', "line 2"),
        ('{"text": "one"}\n["two"]\n', "line 2"),
        ("[1, 2]", "entry 1 is a int"),
        ('[{"text": "one"}', "neither an object a line nor one list"),
        ("[1]\n[2]\n", "line 1: a list"),
        ('"one"\n2\n', "line 2: a int"),
        ("one\ntwo\n", "neither an object a line nor one list"),
    ],
)
def test_broken_json_is_refused_by_its_place(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        rows_of(path)
    assert "rows.jsonl" in str(caught.value)


@pytest.mark.parametrize("kind", [".parquet", ".jsonl.gz", ".txt"])
def test_the_files_of_a_folder_are_one_text(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(13):  # more than take turns at a time
        path = folder / f"part-{number:05}-of-00013{kind}"
        rows = ROWS[number::13]
        if kind == ".parquet":
            write_parquet(path, rows)
        else:
            path.write_bytes(gzip.compress(jsonl(rows)) if kind == ".jsonl.gz" else "\n".join(rows).encode())
    for name in ("README.md", ".hidden.txt", "dataset_info.json"):
        (folder / name).write_text('{"text": "about the data"}')
    (folder / "_SUCCESS").touch()
    source = open_text(str(folder), seed=1)
    assert sorted(map(str, source.rows)) == sorted(ROWS)
    assert (source.name, source.split) == (str(folder), "all")
    assert "README.md" in source.counts.aside
    assert rows_of(f"{tmp_path}/shards/part-0000?-*{kind}") == sorted(row for n in range(10) for row in ROWS[n::13])
    calibration, held_out = (set(rows_of(folder, split)) for split in SPLITS)
    assert calibration | held_out == set(ROWS)
    assert not calibration & held_out


def test_files_of_a_folder_take_turns_so_that_no_file_comes_first_alone(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("\n".join(f"{number} {row}" for row in range(9_000)))
    first = [str(row)[0] for row, _ in zip(open_text(str(tmp_path), seed=2).rows, range(600), strict=False)]
    assert all(first.count(number) > 100 for number in "012")
    orders = [[str(row) for row in open_text(str(tmp_path), seed=seed).rows] for seed in (2, 2, 3)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_files_whose_names_tell_splits_apart_are_splits(tmp_path: Path) -> None:
    for number, name in enumerate(["data/train-00000-of-00001", "data/test-00000-of-00001", "dev/0000"]):
        write_parquet(tmp_path / f"{name}.parquet", ROWS[number::3])
    source = open_text(str(tmp_path))
    assert (sorted(map(str, source.rows)), source.split) == (sorted(ROWS[0::3]), "train")
    assert {"the split test", "the split validation"} <= set(source.counts.aside)
    assert rows_of(tmp_path, "test") == sorted(ROWS[1::3])
    assert set(rows_of(tmp_path, "held-out")) < set(ROWS[0::3])  # by hash, of the split that is usual
    with pytest.raises(UsageError, match="did you mean 'test'"):
        rows_of(tmp_path, "tests")
    for path in tmp_path.rglob("train*"):
        path.unlink()
    with pytest.raises(UsageError, match="test, validation"):
        rows_of(tmp_path)


def test_a_word_in_the_name_of_one_file_makes_no_split(tmp_path: Path) -> None:
    (tmp_path / "test-plan.md").write_text("a cat")
    (tmp_path / "cats.md").write_text("a mat")
    assert rows_of(tmp_path) == ["a cat", "a mat"]


def test_a_folder_of_several_kinds_asks_for_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    with pytest.raises(CalibrationError, match=r"1 \.jsonl\.gz, 1 \.txt.*\n.*--data .*/\*\.txt"):
        rows_of(tmp_path)
    assert rows_of(f"{tmp_path}/*.gz") == sorted(ROWS)
    with pytest.raises(CalibrationError, match="no file's name is like this"):
        rows_of(f"{tmp_path}/*.parquet")


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_dict({"text": ROWS, "id": list(range(40))})
    whole.filter(lambda row: row["id"] % 2 == 0).save_to_disk(str(tmp_path / "even"), num_shards=3)
    assert rows_of(tmp_path / "even") == sorted(ROWS[::2])
    splits = datasets.DatasetDict({"train": whole.select(range(30)), "test": whole.select(range(30, 40))})
    splits.save_to_disk(str(tmp_path / "both"))
    assert rows_of(tmp_path / "both") == sorted(ROWS[:30])
    assert rows_of(tmp_path / "both", "test") == sorted(ROWS[30:])
    arrow = next((tmp_path / "even").glob("*-of-*.arrow"))
    arrow.unlink()
    with pytest.raises(CalibrationError, match=f"{arrow.name}: no such file"):
        rows_of(tmp_path / "even")


def test_an_arrow_file_is_read_in_both_of_its_formats(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ROWS, "picture": [b"\0"] * 40})
    for name, new in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with new(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        assert rows_of(tmp_path / f"{name}.arrow") == sorted(ROWS)


def test_pictures_are_not_read_and_columns_may_have_any_name(tmp_path: Path) -> None:
    pictures = pyarrow.array([{"bytes": b"\0", "path": "a.png"}] * 40)
    table = pyarrow.table({"image": pictures, "a.b": ROWS, "n": list(range(40))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == sorted(ROWS)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_bytes_that_are_text_are_read_as_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    columns = {"id": list(range(40)), "text": [row.encode() for row in ROWS], "png": [b"\x89PNG\0"] * 40}
    write_columns(path, pyarrow.table(columns))
    if suffix == ".parquet":
        assert pyarrow.parquet.ParquetFile(path).schema.column(1).logical_type.type == "NONE"
    source = open_text(str(path))
    assert sorted(map(str, source.rows)) == sorted(ROWS)
    assert source.counts.aside == ("id", "png")
    write_columns(path, pyarrow.table({"text": [*columns["text"], b"\xff"], "id": list(range(41))}))
    with pytest.raises(CalibrationError, match="the column 'text' holds bytes that are no text"):
        rows_of(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_of_bytes_are_named_where_no_text_is_found(tmp_path: Path, suffix: str) -> None:
    sounds = pyarrow.array([{"bytes": b"\0", "path": "a.wav"}] * 9)
    write_columns(tmp_path / f"rows{suffix}", pyarrow.table({"png": [b"\x89PNG\0"] * 9, "sound": sounds}))
    with pytest.raises(
        CalibrationError, match=r"found png \(bytes\), sound \(bytes\)\.\n  None of them is text\. Write the text into"
    ):
        rows_of(tmp_path / f"rows{suffix}")


def write_columns(path: Path, table: pyarrow.Table) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def configured(folder: Path) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: raw\n  data_files: raw.jsonl\n- config_name: clean\n"
        "  data_files:\n  - split: train\n    path: clean.jsonl\n  - split: test\n    path: more.jsonl\n---\n# Rows\n"
    )
    for number, name in enumerate(("raw", "clean", "more")):
        (folder / f"{name}.jsonl").write_bytes(jsonl(ROWS[number::3]))
    return folder


def test_a_folder_with_configurations_is_read_by_the_one_that_is_named(tmp_path: Path) -> None:
    folder = configured(tmp_path / "two")
    with pytest.raises(CalibrationError, match=r"several configurations: raw, clean\.\n.*--config raw"):
        rows_of(folder)
    with pytest.raises(CalibrationError, match=r"no configuration 'row': raw, clean\."):
        rows_of(folder / "row")
    assert rows_of(folder / "raw") == sorted(ROWS[0::3])
    assert rows_of(folder / "clean") == sorted(ROWS[1::3])
    assert rows_of(folder / "clean", "test") == sorted(ROWS[2::3])
    assert rows_of(folder / "raw.jsonl") == sorted(ROWS[0::3])
    with pytest.raises(KvprofError, match="no such file"):
        rows_of(folder / "gone.jsonl")


def test_reading_parquet_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a shuffled stream of Parquet early: datasets waits five seconds behind each."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    write_parquet(tmp_path / "rows.parquet", ROWS)
    rows = open_text(str(tmp_path / "rows.parquet")).rows
    next(rows)
    del rows
    assert slept == []


def test_several_files_of_parquet_on_a_hub_wait_for_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands for the hub's dataset: datasets streams both alike."""
    slept: list[float] = []
    for number in range(3):
        write_parquet(tmp_path / f"part-{number}.parquet", ROWS[number::3])
    rows = _streamed(str(tmp_path), {"split": "train"}, "hub", 0)
    monkeypatch.setattr("time.sleep", slept.append)
    first = next(rows)["text"]
    del rows
    assert slept == []
    orders = [[row["text"] for row in _streamed(str(tmp_path), {"split": "train"}, "hub", seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][0] == first
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(ROWS)
