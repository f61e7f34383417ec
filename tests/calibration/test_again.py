"""Is a text known again by its fingerprint, however its rows were cut, and told apart from one that has changed?"""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import save_folder, save_text

from kvprof.calibration.again import read_again, recognise
from kvprof.calibration.mix import MixedText, mix_texts
from kvprof.calibration.sequences import CalibrationSet
from kvprof.errors import CalibrationError
from kvprof.models.load import load_tokenizer, resolve


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
    first = complete(mix_texts(named, None, tokenizer, 5, 12, 3, pack))
    again, same = recognise(first.info, read_again(first.info, tokenizer), complete)
    assert same
    assert again.sequences == first.sequences
    assert again.info == first.info


def test_a_text_that_has_changed_is_read_but_not_taken_for_the_same(tokenizer: object, tmp_path: Path) -> None:
    text = save_text(tmp_path / "text.txt", rows=60)
    first = mix_texts([str(text)], None, tokenizer, 5, 12).complete()
    text.write_text("\n".join(["mat at all no another mat cat saw the"] * 60))
    again, same = recognise(first.info, read_again(first.info, tokenizer), complete)
    assert not same
    assert len(again.sequences) == 5
    nobody_knows = first.info.model_copy(update={"fingerprint": None})
    assert not recognise(nobody_knows, read_again(nobody_knows, tokenizer), complete)[1]


def test_a_text_too_short_to_pack_is_read_row_by_row(tokenizer: object, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the cat sat\n")
    first = mix_texts([str(text)], None, tokenizer, 1, 12).complete()
    assert recognise(first.info, read_again(first.info, tokenizer), complete)[1]


def test_a_text_that_is_gone_is_named(tokenizer: object, tmp_path: Path) -> None:
    text = save_text(tmp_path / "text.txt")
    info = mix_texts([str(text)], None, tokenizer, 2, 12).complete().info
    text.unlink()
    with pytest.raises(CalibrationError, match="cannot be read again") as raised:
        read_again(info, tokenizer)
    assert f"{text}: no such file" in str(raised.value)
