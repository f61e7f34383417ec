"""Is a text known again by its fingerprint, however its rows were cut, and told apart from one that has changed?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from folders import save_folder, save_text
from tokenizers import processors

from kvprof.calibration.again import read_again, recognise
from kvprof.calibration.mixture import MixedText, TextRequest, mix_texts
from kvprof.calibration.sequences import CalibrationSet
from kvprof.errors import CalibrationError
from kvprof.models.load import load_tokenizer, resolve
from kvprof.records.scores import CalibrationInfo


@pytest.fixture
def tokenizer(tmp_path: Path) -> object:
    return load_tokenizer(resolve(str(save_folder(tmp_path / "model"))))


def complete(reading: MixedText) -> CalibrationSet:
    return reading.complete([(7,) * reading.sequence_length] * reading.to_write)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "data",
    [["{text}"], ["{text}:2", "builtin"], ["{text}", "self"], ["{text}", "builtin:3", "self:0.5"]],  # too late for self
)
def test_a_text_is_known_again_however_it_was_cut(
    tokenizer: object, tmp_path: Path, pack: bool, data: list[str]
) -> None:
    text = save_text(tmp_path / "text.txt", rows=60)
    named = [word.format(text=text) for word in data]
    first = complete(mix_texts(TextRequest(named, 5, 12, seed=3, pack=pack), tokenizer))
    again, same = recognise(first.info, read_again(first.info, tokenizer), complete)
    assert same
    assert again.sequences == first.sequences
    assert again.info == first.info


@pytest.fixture
def begun(tokenizer: Any) -> Any:
    """The tokenizer, with a mark that it puts before every text."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize("pack", [False, True])
def test_a_text_with_a_beginning_is_known_again(begun: Any, tmp_path: Path, pack: bool) -> None:
    text = save_text(tmp_path / "text.txt", rows=60)
    first = complete(mix_texts(TextRequest([str(text), "builtin", "self"], 5, 12, seed=3, pack=pack), begun))
    assert first.info.begins_with == ("<unk>",)
    again, same = recognise(first.info, read_again(first.info, begun), complete)
    assert same
    assert again.info == first.info


def test_an_old_file_is_read_as_it_was_with_windows_that_begin_in_the_middle_of_the_text(
    begun: Any, tmp_path: Path
) -> None:
    row = "the cat sat on a mat and another cat saw that mat at all"
    text = tmp_path / "text.txt"
    text.write_text(row)
    first = mix_texts(TextRequest([str(text)], 3, 5, pack=True), begun).complete()
    joined = begun(row)["input_ids"]  # the mark, and fourteen words
    old = tokenize_as_before(joined, 5, 3, first.info)
    again, same = recognise(old.info, read_again(old.info, begun), complete)
    assert same
    assert again.sequences == old.sequences != first.sequences
    assert again.info.begins_with is None
    assert list(again.remarks(3)) == list(again.about_text())


def tokenize_as_before(joined: list[int], length: int, count: int, info: CalibrationInfo) -> CalibrationSet:
    windows = tuple(tuple(joined[start : start + length]) for start in range(0, length * count, length))
    text = ";".join(",".join(map(str, window)) for window in windows)
    fields = {
        "fingerprint": "sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        "begins_with": None,
        "sequences": count,
    }
    return CalibrationSet(windows, info.model_copy(update=fields), 0)


def test_a_text_that_has_changed_is_read_but_not_taken_for_the_same(tokenizer: object, tmp_path: Path) -> None:
    text = save_text(tmp_path / "text.txt", rows=60)
    first = mix_texts(TextRequest([str(text)], 5, 12), tokenizer).complete()
    text.write_text("\n".join(["mat at all no another mat cat saw the"] * 60))
    again, same = recognise(first.info, read_again(first.info, tokenizer), complete)
    assert not same
    assert len(again.sequences) == 5
    nobody_knows = first.info.model_copy(update={"fingerprint": None})
    assert not recognise(nobody_knows, read_again(nobody_knows, tokenizer), complete)[1]


def test_a_text_too_short_to_pack_is_read_row_by_row(tokenizer: object, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the cat sat\n")
    first = mix_texts(TextRequest([str(text)], 1, 12), tokenizer).complete()
    assert recognise(first.info, read_again(first.info, tokenizer), complete)[1]


def test_a_text_that_is_gone_is_named(tokenizer: object, tmp_path: Path) -> None:
    text = save_text(tmp_path / "text.txt")
    info = mix_texts(TextRequest([str(text)], 2, 12), tokenizer).complete().info
    text.unlink()
    with pytest.raises(CalibrationError, match="cannot be read again") as raised:
        read_again(info, tokenizer)
    assert f"{text}: no such file" in str(raised.value)
