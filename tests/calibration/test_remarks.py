"""What is said of a calibration text: what was read, and what of it misleads, in every way of cutting it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvprof.calibration.mixture import MixedText, TextRequest, mix_texts

WORDS = [f"w{number}" for number in range(2000)]
OWN = "<|im_start|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return a tokenizer of two thousand words, one token each, which knows a mark of its own."""
    model = models.WordLevel(vocab={word: number for number, word in enumerate(["?", "</s>", *WORDS])}, unk_token="?")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": [OWN]})
    return fast


def some_words(number: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=number))


def read(path: Path, rows: list[Any], tokenizer: Any, sequences: int = 8, length: int = 64, **how: Any) -> MixedText:
    entries = [row if isinstance(row, dict) else {"id": f"r{n}", "text": row} for n, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in entries))
    return mix_texts(TextRequest([str(path)], sequences, length, **how), tokenizer)


def misleads(text: MixedText) -> list[str]:
    return [said for said in text.about_text() if said not in text.readings[:1]]


@pytest.mark.parametrize("pack", [False, True])
def test_a_text_says_its_column_its_rows_their_length_and_what_is_left_aside(
    tmp_path: Path, tokenizer: Any, pack: bool
) -> None:
    rows = [*(some_words(100 + number, number) for number in range(20)), "", None, " "]
    text = read(tmp_path / "rows.jsonl", rows, tokenizer, 8, pack=pack)
    said = text.readings[0]
    assert said.startswith(f"{tmp_path}/rows.jsonl: column 'text'; ")
    assert " of 23 rows read, of 1" in said
    assert "left aside: id" in said
    assert misleads(text) == []
    assert tuple(text.complete().remarks(8)) == text.readings
    whole = read(tmp_path / "rows.jsonl", rows, tokenizer, 99, length=200, pack=pack)
    assert "20 of 23 rows read, of 110 tokens in the median; left aside: id, 3 rows without text" in whole.readings[0]


def test_rows_without_text_say_what_text_they_have_elsewhere(tmp_path: Path, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": some_words(40, 1)}]
    rows = [*({"text": some_words(100, number)} for number in range(9)), {"id": "c1", "messages": messages}]
    rows += [{"id": "c2", "body": some_words(40, 2), "url": "https://a.example/b"}, {"id": "c3", "text": " "}]
    text = read(tmp_path / "rows.jsonl", rows, tokenizer, 99)
    assert "3 rows without text (they hold text in body, messages)" in text.readings[0]
    assert text.readings[0].endswith("messages)")


@pytest.mark.parametrize("pack", [False, True])
def test_headings_are_said_with_the_flag_that_joins_them(tmp_path: Path, tokenizer: Any, pack: bool) -> None:
    rows = [some_words(5 if number % 3 else 90, number) for number in range(60)]
    (said,) = misleads(read(tmp_path / "rows.jsonl", rows, tokenizer, 12, pack=pack))
    assert "are shorter than 32 tokens" in said
    assert ("--pack" in said) is not pack
    assert "--column" in said
    long = [some_words(5 if number % 3 == 0 else 90, number) for number in range(60)]
    assert misleads(read(tmp_path / "rows.jsonl", long, tokenizer, 12, pack=pack)) == []


@pytest.mark.parametrize("pack", [False, True])
def test_a_sequence_that_is_there_twice_is_said(tmp_path: Path, tokenizer: Any, pack: bool) -> None:
    rows = [some_words(63, number % 4) for number in range(12)]  # with the end mark behind, a window each
    (said,) = misleads(read(tmp_path / "rows.jsonl", rows, tokenizer, 12, pack=pack))
    assert "4 of 12 differ" in said
    assert "--sequences to 4" in said
    same_start = [some_words(64, 1) + " " + some_words(20, number) for number in range(8)]
    assert any("1 of 8 differ" in said for said in misleads(read(tmp_path / "r.jsonl", same_start, tokenizer)))
    assert misleads(read(tmp_path / "r.jsonl", same_start, tokenizer, length=84)) == []


@pytest.mark.parametrize("pack", [False, True])
def test_text_of_few_distinct_tokens_is_said_but_of_a_model_of_bytes(
    tmp_path: Path, tokenizer: Any, pack: bool
) -> None:
    poor = [" ".join(random.Random(number).choices(WORDS[:90], k=80)) for number in range(20)]
    (said,) = misleads(read(tmp_path / "rows.jsonl", poor, tokenizer, 16, pack=pack))
    assert "distinct tokens" in said
    assert "--data" in said
    rich = [" ".join(random.Random(number).choices(WORDS[:200], k=80)) for number in range(20)]
    assert misleads(read(tmp_path / "rows.jsonl", rich, tokenizer, 16, pack=pack)) == []
    small = Tokenizer(models.WordLevel(vocab={word: n for n, word in enumerate(["?", *WORDS[:200]])}, unk_token="?"))
    small.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    of_bytes = PreTrainedTokenizerFast(tokenizer_object=small, unk_token="?")
    assert misleads(read(tmp_path / "rows.jsonl", poor, of_bytes, 16, pack=pack)) == []


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "mark",
    ["<|im_end|>", "[INST]", "<s>", "<|start_header_id|>", "<start_of_turn>", "<|endoftext|>", "<<SYS>>", "<|user|>"],
)
def test_another_models_marks_in_plain_text_are_said(tmp_path: Path, tokenizer: Any, mark: str, pack: bool) -> None:
    rows = [f"{mark} {some_words(100, number)}" for number in range(20)]
    (said,) = misleads(read(tmp_path / "rows.jsonl", rows, tokenizer, pack=pack))
    assert f"special tokens of another model in plain text, {mark}," in said
    assert "--column" in said


def test_marks_of_its_own_are_said_apart_and_a_few_rows_about_marks_are_not(tmp_path: Path, tokenizer: Any) -> None:
    rows = [f"{OWN} {some_words(100, number)}" for number in range(20)]
    (said,) = misleads(read(tmp_path / "rows.jsonl", rows, tokenizer))
    assert f"special tokens in plain text, {OWN}, which this tokenizer reads as marks" in said
    few = [f"{'[INST]' if number == 3 else ''} {some_words(100, number)}" for number in range(40)]
    assert misleads(read(tmp_path / "rows.jsonl", few, tokenizer, 40)) == []


def test_a_mix_says_of_each_text_what_was_read_of_it(in_tmp: Path, tokenizer: Any) -> None:
    for name in "ab":
        (in_tmp / f"{name}.txt").write_text("\n".join(some_words(80, ord(name) + 9 * number) for number in range(9)))
    text = mix_texts(TextRequest(["a.txt", "b.txt:2"], 6, 64), tokenizer)
    assert text.readings == (
        "a.txt: 2 of 9 rows read, of 80 tokens in the median",
        "b.txt: 4 of 9 rows read, of 80 tokens in the median",
    )
