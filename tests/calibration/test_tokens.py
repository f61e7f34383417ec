"""What a tokenizer puts before a text is found, whatever it puts behind it; where it fails, one message says so."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvprof.calibration.tokens import UNKNOWN, Beginning, beginning_of, token_ids
from kvprof.errors import CalibrationError, UsageError

VOCABULARY = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[LANG]": 3, "cat": 4, "sat": 5}


def a_tokenizer(template: str | None = None, unknown: str | None = "[UNK]") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=unknown) if unknown else models.WordLevel(VOCABULARY))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        marks = [(name, VOCABULARY[name]) for name in ("[CLS]", "[SEP]", "[LANG]")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, eos_token="[SEP]")


@pytest.mark.parametrize(
    ("template", "ids", "tokens"),
    [
        (None, (), ()),
        ("$A [SEP]", (), ()),
        ("[CLS] $A", (1,), ("[CLS]",)),
        ("[CLS] $A [SEP]", (1,), ("[CLS]",)),
        ("[LANG] [CLS] $A [SEP] [SEP]", (3, 1), ("[LANG]", "[CLS]")),
    ],
)
@pytest.mark.parametrize("unknown", ["[UNK]", None])
def test_the_beginning_is_what_the_tokenizer_puts_before_a_text(
    template: str | None, ids: tuple[int, ...], tokens: tuple[str, ...], unknown: str | None
) -> None:
    assert beginning_of(a_tokenizer(template, unknown)) == Beginning(ids, tokens)


def test_a_tokenizer_that_reads_a_text_otherwise_without_marks_has_no_known_beginning() -> None:
    class Wayward:
        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [1, 2] if add_special_tokens else [3]}

    assert beginning_of(Wayward()) == UNKNOWN


def broken(error: BaseException) -> Any:
    class BrokenTokenizer:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            raise error

    return BrokenTokenizer()


@pytest.mark.parametrize(
    "error", [KeyError("<0x0A>"), ValueError("no model\nand more"), RuntimeError(), TypeError("x")]
)
def test_a_tokenizer_that_fails_is_one_message_with_its_name_and_what_to_do(error: Exception) -> None:
    with pytest.raises(CalibrationError, match=r"the tokenizer \(BrokenTokenizer\) fails on text: ") as raised:
        token_ids(broken(error), "a text")
    first, second = str(raised.value).splitlines()
    assert type(error).__name__ in first
    assert "tokenizer files of the model" in second
    with pytest.raises(CalibrationError, match="BrokenTokenizer"):
        beginning_of(broken(error))


@pytest.mark.parametrize("answer", [None, {}, {"input_ids": None}, {"input_ids": ["a"]}, {"input_ids": [[1]]}])
def test_an_answer_that_is_no_list_of_tokens_is_a_failure_too(answer: object) -> None:
    def tokenizer(text: str, **_: object) -> object:
        return answer

    with pytest.raises(CalibrationError, match=r"the tokenizer \(function\) fails on text"):
        token_ids(tokenizer, "a text")


def test_what_is_no_failure_of_the_tokenizer_goes_through() -> None:
    for error in (UsageError("said already"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            token_ids(broken(error), "a text")
