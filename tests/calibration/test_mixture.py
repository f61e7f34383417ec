"""How several texts become one list of sequences: whose turn it is, and what is said of it afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprof.calibration import mixture as mix
from kvprof.calibration.again import read_again, recognise
from kvprof.calibration.mixture import MixedText, TextRequest, mix_again, mix_texts, turns
from kvprof.calibration.sequences import CalibrationSet, tokenize
from kvprof.calibration.text import SPLITS, TextSource, open_text, split_of
from kvprof.errors import CalibrationError, UsageError
from kvprof.records.scores import CalibrationInfo

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 9).map(Fraction), st.fractions(Fraction(1, 50), 50)), min_size=2, max_size=6
)


class Letters:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = None

    def __call__(self, row: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(row.encode())}


def write(folder: Path, name: str, rows: int, letter: str = "") -> str:
    """Write a file of rows that say which file and row they are; return its name."""
    path = folder / f"{name}.txt"
    path.write_text("".join(f"{letter or name}{row:03}\n" for row in range(rows)), encoding="utf-8")
    return path.name


def plain_text(name: str, split: str | None = None, seed: int = 0, column: str | None = None) -> TextSource:
    """Open a .txt file, its rows as they stand."""
    if not name.endswith(".txt"):
        return open_text(name, split, seed, column)
    rows = Path(name).read_text(encoding="utf-8").splitlines()
    return TextSource(name, split or "all", (row for row in rows if split in (None, "all", split_of(row))))


@pytest.fixture(autouse=True)
def rows_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "open_text", plain_text)


def mixed(data: Sequence[str], sequences: int, split: str | None = None, length: int = 8, **how: Any) -> MixedText:
    return mix_texts(TextRequest(data, sequences, length, split=split, **how), Letters())


def befell(text: CalibrationSet, asked: int) -> list[str]:
    """Return what a set of so many sequences says but what it says of every text."""
    said = list(text.about_text())
    return [remark for remark in text.remarks(asked) if remark not in said]


def letters(text: CalibrationSet) -> str:
    """The first letter of every sequence."""
    return "".join(chr(ids[0]) for ids in text.sequences)


@given(WEIGHTS, st.integers(1, 150))
def test_every_prefix_has_of_each_text_its_share_to_within_a_sequence(weights: list[Fraction], count: int) -> None:
    had: Counter[int] = Counter()
    bound = 1 - Fraction(1, 2 * len(weights) - 2)
    for number, place in enumerate(islice(turns(weights), count), start=1):
        had[place] += 1
        assert all(abs(had[of] - number * weight / sum(weights)) <= bound for of, weight in enumerate(weights))


@given(WEIGHTS, st.integers(0, 40))
def test_turns_without_one_who_left_are_as_even_as_those_before(weights: list[Fraction], count: int) -> None:
    had = Counter(islice(turns(weights), count))
    left = range(1, len(weights))
    total = sum(weights[1:])
    for place in islice(turns(weights[1:], [had[of] for of in left]), 100):
        had[place + 1] += 1
        number = sum(had[of] for of in left)
        assert all(abs(had[of] - number * weights[of] / total) < 2 for of in left)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1], "aaaa"),
        ([1, 1], "abab"),
        ([1, 1, 1], "abcabc"),
        ([2, 1], "abaaba"),
        ([1, 2], "babbab"),
        ([3, 1], "aabaaaba"),
        ([2, 1, 1], "abcaabca"),
    ],
)
def test_turns_are_even_from_the_first_on(weights: list[int], expected: str) -> None:
    found = "".join("abc"[place] for place in islice(turns([Fraction(w) for w in weights]), len(expected)))
    assert found == expected


@given(WEIGHTS, st.fractions(Fraction(1, 9), 9))
def test_only_the_ratio_of_weights_matters(weights: list[Fraction], factor: Fraction) -> None:
    scaled = [weight * factor for weight in weights]
    assert list(islice(turns(weights), 60)) == list(islice(turns(scaled), 60))


def test_texts_are_taken_in_turns(in_tmp: Path) -> None:
    data = [write(in_tmp, name, 9) for name in "abc"]
    assert letters(mixed(data, 7).complete()) == "abcabca"
    assert letters(mixed([data[2], f"{data[0]}:2"], 6).complete()) == "acaaca"


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from(["1", "2", "0.5", "0.3"]), min_size=4, max_size=4),
    own=st.booleans(),
    sequences=st.integers(1, 30),
)
def test_asking_for_more_changes_nothing_before(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], weights: list[str], own: bool, sequences: int
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    files = [f"{folder}/{write(folder, name, count)}" for name, count in zip("abcd", rows, strict=False)]
    data = [f"{name}:{weight}" for name, weight in zip([*files, *["self"] * own], weights, strict=False)]
    source = {name: plain_text(name).rows for name in files}
    whole = mixed(data, 40).drawn
    assert mixed(data, sequences).drawn == whole[:sequences]
    assert len(whole) == (40 if len(data) > len(files) else sum(rows))
    for place, ids in whole:  # each text in its own order, none of its rows twice
        assert ids is None or bytes(ids).decode() == next(source[files[place]])


def test_files_are_read_side_by_side(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "open_text", open_text)
    data = [write(in_tmp, "a", 30), write(in_tmp, "b", 30)]
    text = mixed(data, 40, seed=1).complete()
    assert letters(text) == "ab" * 20
    for place, name in enumerate(data):
        alone = tokenize(open_text(name, None, 1), Letters(), 20, 8)
        assert text.sequences[place::2] == alone.sequences


def test_where_a_text_runs_out_the_others_take_its_turns_by_their_weights(in_tmp: Path) -> None:
    data = [write(in_tmp, "a", 2), write(in_tmp, "b", 20) + ":2", write(in_tmp, "c", 20)]
    text = mixed(data, 16).complete()
    assert letters(text) == "bacbbacb" + "bcbbcbbc"
    assert befell(text, 16) == ["a.txt ran out after 2 sequences: other text takes its turns"]
    assert text.info.sources is not None
    assert [(share.dataset, share.sequences) for share in text.info.sources] == [
        ("a.txt", 2),
        ("b.txt", 9),
        ("c.txt", 5),
    ]


def test_where_every_text_runs_out_the_set_is_what_there_was(in_tmp: Path) -> None:
    text = mixed([write(in_tmp, "a", 2), write(in_tmp, "b", 3)], 9).complete()
    assert letters(text) == "ababb"
    assert befell(text, 9) == [
        "a.txt ran out after 2 sequences: other text takes its turns",
        "the text holds only 5 of the 9 sequences asked for",
    ]
    assert befell(mixed(["a.txt", "b.txt"], 4).complete(), 4) == []  # nothing was missing yet


def test_a_text_with_nothing_in_it_is_an_error_of_its_own(in_tmp: Path) -> None:
    write(in_tmp, "a", 5)
    (in_tmp / "short.txt").write_text("x\ny\n")
    with pytest.raises(CalibrationError, match=r"short.txt.* 2 rows were too short"):
        mixed(["a.txt", "short.txt"], 4)


def test_rows_too_short_are_counted_over_all_texts(in_tmp: Path) -> None:
    for name in "ab":
        (in_tmp / f"{name}.txt").write_text(f"x\n{name}1\ny\n{name}2\n")
    assert mixed(["a.txt", "b.txt"], 4).complete().skipped == 4


def test_a_text_whose_turn_never_came_is_said_and_left_out(in_tmp: Path) -> None:
    data = [write(in_tmp, "a", 9), f"{write(in_tmp, 'b', 9)}:0.01", "self:0.01"]
    text = mixed(data, 3)
    assert text.to_write == 0
    found = text.complete()
    assert (found.info.dataset, found.info.sources, found.info.source_of) == ("a.txt", None, None)
    assert [remark.split(":")[0] for remark in befell(found, 3)] == [
        "none of the 3 sequences is of b.txt",
        "none of the 3 sequences is of self",
    ]
    three = mixed(["a.txt:0.01", *data[1:2], "self"], 1).complete([(1, 2, 3)])
    assert (three.info.dataset, three.info.split, three.info.sources) == ("self", "calibration", None)


@pytest.mark.parametrize("split", [None, "held-out", "all"])
def test_a_single_text_is_what_it_was_without_a_mix(in_tmp: Path, split: str | None) -> None:
    data = write(in_tmp, "a", 40)
    for name, length in ((data, 8), ("builtin", 50)):
        expected = tokenize(plain_text(name, split, 3), Letters(), 5, length, 3)
        assert mixed([f"{name}:7"], 5, split, length, seed=3).complete() == expected
        assert "sources" not in expected.info.model_dump()
        assert list(expected.identity)[:2] == ["dataset", "split"]


def test_a_mix_says_what_it_is_made_of(in_tmp: Path) -> None:
    data = [write(in_tmp, "a", 9), "self:0.5"]
    text = mixed(data, 3, seed=4, split="held-out")
    assert (text.to_write, text.lengths, text.split) == (1, (4, 8, 4), "held-out")
    found = text.complete([tuple(range(8))])
    info = found.info
    assert info.model_dump() == {
        "dataset": "a.txt+self",
        "split": "held-out",
        "sequences": 3,
        "sequence_length": 8,
        "tokens": 16,
        "seed": 4,
        "fingerprint": info.fingerprint,
        "sequence_fingerprints": info.sequence_fingerprints,
        "begins_with": (),
        "sources": (
            {"dataset": "a.txt", "split": "held-out", "weight": 1.0, "sequences": 2, "tokens": 8},
            {"dataset": "self", "split": "held-out", "weight": 0.5, "sequences": 1, "tokens": 8},
        ),
        "source_of": (0, 1, 0),
    }
    assert found.identity == {
        "dataset": "a.txt+self",
        "weights": [1.0, 0.5],
        "splits": ["held-out", "held-out"],
        "split": "held-out",
        "sequences": 3,
        "sequence_length": 8,
        "tokens": 16,
        "seed": 4,
        "text fingerprint": info.fingerprint,
    }


def test_the_fingerprint_is_of_the_tokens_in_their_order(in_tmp: Path) -> None:
    a, b = write(in_tmp, "a", 9), write(in_tmp, "b", 9)
    found = [mixed(data, 4).complete().info.fingerprint for data in ([a, b], [b, a], [a, f"{b}:2"], [a], [f"{a}:2", b])]
    assert len(set(found)) == 5
    joined = write(in_tmp, "joined", 0)
    (in_tmp / joined).write_text("a000\nb000\na001\nb001\n")
    assert mixed([joined], 4).complete().info.fingerprint == found[0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_first_sequences_of_a_mix_are_the_mix_of_fewer(in_tmp: Path, count: int) -> None:
    data = [write(in_tmp, "a", 2), write(in_tmp, "b", 9), "self"]
    own = [(9, 9, number) for number in range(9)]

    def of(number: int) -> CalibrationSet:
        text = mixed(data, number)
        return text.complete(own[: text.to_write])

    assert of(9).first(count).sequences == of(count).sequences
    assert of(9).first(count).info == of(count).info
    assert of(9).first(9) == of(9)


def test_what_the_model_has_to_write_must_be_there(in_tmp: Path) -> None:
    text = mixed(["self", write(in_tmp, "a", 9)], 4)
    for written in ([], [(1, 2)], [(1, 2)] * 3):
        with pytest.raises(CalibrationError, match=f"the model writes: 2 sequences are wanted, {len(written)} written"):
            text.complete(written)


def test_a_split_is_of_each_text_that_has_it(in_tmp: Path) -> None:
    data = ["builtin", write(in_tmp, "a", 30), "self"]

    def splits(split: str | None, **how: str) -> list[str | None]:
        return [origin.split for origin in mixed(data, 3, split, **how).origins]

    assert splits(None) == ["calibration", "all", "calibration"]
    assert splits(None, usual_split="held-out") == ["held-out", "all", "held-out"]
    for split in (*SPLITS, "all"):
        assert splits(split) == [split] * 3
    calibration, held_out = ({ids for _, ids in mixed(["a.txt"], 30, split).drawn} for split in SPLITS)
    assert len(calibration) + len(held_out) == 30
    assert not calibration & held_out


@pytest.mark.parametrize("data", [["self"], ["builtin", "self"], ["a.txt", "self"]])
def test_a_misspelt_split_is_offered(in_tmp: Path, data: list[str]) -> None:
    write(in_tmp, "a", 3)
    with pytest.raises(UsageError, match="did you mean 'held-out'"):
        mixed(data, 2, "heldout")


def test_of_a_hub_dataset_among_others_the_splits_are_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rows = [f"hub {number}" for number in range(40)]

    def opened(name: str, split: str | None, seed: int, column: str | None) -> TextSource:
        asked.append((name, split))
        return open_text(name, split, seed) if name == "builtin" else TextSource(name, split or "train", iter(rows))

    monkeypatch.setattr(mix, "open_text", opened)
    found = {split: mixed(["org/name", "builtin"], 20, split) for split in (*SPLITS, "all", "test", None)}
    for split in SPLITS:
        own = [bytes(ids).decode() for place, ids in found[split].drawn if place == 0 and ids is not None]
        assert own == [row for row in rows if split_of(row) == split][: len(own)]
    assert [[origin.split for origin in text.origins] for text in found.values()] == [
        ["calibration", "calibration"],
        ["held-out", "held-out"],
        ["all", "all"],
        ["test", "calibration"],  # its own, which the other has not
        ["train", "calibration"],
    ]
    asked.clear()
    mixed(["org/name"], 2, "calibration")
    assert asked == [("org/name", "calibration")]  # alone, all of its splits are its own


def test_a_text_that_is_no_text_is_refused_before_anything_is_read(in_tmp: Path) -> None:
    write(in_tmp, "a", 3)
    for data, words in (
        (["a.txt", "bultin"], "did you mean 'builtin'"),
        (["a.txt", "slef"], "did you mean 'self'"),
        (["a.txt", "Self"], "did you mean 'self'"),
    ):
        with pytest.raises(UsageError, match=words):
            mixed(data, 2)
    with pytest.raises(UsageError, match="--sequences 0"):
        mixed(["a.txt", "self"], 0)
    with pytest.raises(UsageError, match="--sequence-length 1"):
        mixed(["self"], 1, length=1)
    with pytest.raises(UsageError, match="self is text that the model writes"):
        open_text("self")


def test_tokens_that_the_model_does_not_know_are_found_before_it_writes(in_tmp: Path) -> None:
    text = mixed(["self", write(in_tmp, "a", 3)], 4)
    text.check_vocabulary(256)
    with pytest.raises(CalibrationError, match="writes token 97, but the model's vocabulary has 90"):
        text.check_vocabulary(90)
    mixed(["self"], 4).check_vocabulary(1)


@pytest.mark.parametrize("data", [["a.txt"], ["self"], ["a.txt", "b.txt:0.3", "self:2"], ["builtin", "a.txt", "b.txt"]])
@pytest.mark.parametrize(("split", "pack"), [(None, False), ("calibration", True), ("all", False)])
def test_what_was_written_down_is_enough_to_read_it_again(
    in_tmp: Path, data: list[str], split: str | None, pack: bool
) -> None:
    write(in_tmp, "a", 5)
    write(in_tmp, "b", 40)
    text = mixed(data, 12, split, seed=2, pack=pack)
    own = [(7, number) for number in range(20)]
    first = text.complete(own[: text.to_write])
    info = CalibrationInfo.model_validate_json(first.info.model_dump_json())  # as a file has it

    def fill(mix: MixedText) -> CalibrationSet:
        return mix.complete(own[: mix.to_write])

    assert fill(mix_again(info, Letters(), pack)).info == first.info
    again, same = recognise(info, read_again(info, Letters()), fill)
    assert same
    assert again.sequences == first.sequences


def test_text_that_the_model_writes_is_not_read_again_without_it(in_tmp: Path) -> None:
    info = mixed([write(in_tmp, "a", 5), "self"], 2).complete([(1, 2)]).info
    with pytest.raises(CalibrationError, match="self is text that the model writes"):
        recognise(info, read_again(info, Letters()), MixedText.complete)


def test_a_text_that_has_changed_since_is_not_taken_for_the_same(in_tmp: Path) -> None:
    data = [write(in_tmp, "a", 5), write(in_tmp, "b", 5)]
    info = mixed(data, 6).complete().info
    write(in_tmp, "b", 5, letter="c")
    text, same = recognise(info, read_again(info, Letters()), MixedText.complete)
    assert not same
    assert letters(text) == "acacac"
    (in_tmp / "b.txt").write_text("")
    with pytest.raises(CalibrationError, match="cannot be read again"):
        read_again(info, Letters())
