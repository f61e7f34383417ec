"""How rows become sequences and batches: what is cut, what is skipped, what is padded, and that nothing else is."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvprof.calibration.sequences import IGNORED, PIECE_CHARACTERS, CalibrationSet, batches, tokenize
from kvprof.calibration.text import TextSource, open_text
from kvprof.errors import CalibrationError, UsageError
from kvprof.models.load import load_tokenizer, resolve

WORDS = [f"w{number}" for number in range(50)]
BOS, EOS = 1, 2
FIRST = 3  # the token of w0


def a_tokenizer(bos: bool = False, appends_eos: bool = False, has_eos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word: w0 is 3, w1 is 4 and so on."""
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {word: FIRST + n for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos or appends_eos:
        template = f"{'<s> ' if bos else ''}$A{' </s>' if appends_eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>" if has_eos else None
    )


def source(*rows: str, packed: bool = False) -> TextSource:
    return TextSource("rows", "all", iter(rows), packed)


def words(start: int, stop: int) -> str:
    return " ".join(WORDS[start:stop])


def ids(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(FIRST + start, FIRST + stop))


def test_a_row_is_a_sequence_and_a_long_one_keeps_its_beginning() -> None:
    found = tokenize(source(words(0, 4), words(10, 30)), a_tokenizer(), 8, 6)
    assert found.sequences == (ids(0, 4), ids(10, 16))
    assert found.skipped == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_own_truncation_changes_nothing(side: str) -> None:
    tokenizer = a_tokenizer()
    tokenizer.truncation_side = side
    tokenizer.model_max_length = 3
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    assert tokenize(source(words(0, 9)), tokenizer, 1, 6).sequences == (ids(0, 6),)


def test_the_mark_of_beginning_is_kept_and_counts_as_a_token() -> None:
    found = tokenize(source(words(0, 9), words(5, 6)), a_tokenizer(bos=True), 8, 4)
    assert found.sequences == ((BOS, *ids(0, 3)), (BOS, *ids(5, 6)))
    assert found.info.tokens == 6


def test_rows_too_short_to_have_a_target_are_skipped_and_counted() -> None:
    found = tokenize(source(words(0, 1), words(0, 2), "", words(3, 4), words(4, 9)), a_tokenizer(), 8, 16)
    assert found.sequences == (ids(0, 2), ids(4, 9))
    assert found.skipped == 3


def test_no_more_rows_are_read_than_are_asked_for() -> None:
    def endless():  # type: ignore[no-untyped-def]
        yield words(0, 1)
        while True:
            yield words(0, 5)

    found = tokenize(TextSource("endless", "all", endless()), a_tokenizer(), 3, 8)
    assert len(found.sequences) == 3
    assert found.skipped == 1


@pytest.mark.parametrize("pack", [True, False])
def test_packing_joins_rows_and_cuts_windows_of_the_full_length(pack: bool) -> None:
    rows = source(words(0, 3), words(3, 8), words(8, 10), packed=not pack)
    found = tokenize(rows, a_tokenizer(), 8, 4, pack=pack)
    joined = (*ids(0, 3), EOS, *ids(3, 8), EOS, *ids(8, 10), EOS)
    assert found.sequences == tuple(joined[start : start + 4] for start in (0, 4, 8))
    assert found.info.tokens == 12


def test_packing_puts_no_second_mark_where_the_tokenizer_ends_a_row_itself() -> None:
    found = tokenize(source(words(0, 3), words(3, 6)), a_tokenizer(appends_eos=True), 8, 4, pack=True)
    assert found.sequences == ((*ids(0, 3), EOS), (*ids(3, 6), EOS))


def test_every_window_begins_as_the_tokenizer_begins_a_text_and_no_token_is_lost() -> None:
    found = tokenize(source(words(0, 3), words(3, 9), words(9, 16)), a_tokenizer(bos=True), 9, 5, pack=True)
    # <s> w0 w1 w2 </s> <s> w3 ... w8 </s> <s> w9 ... w15 </s>, cut: each window has <s> once at its beginning.
    assert found.sequences == (
        (BOS, *ids(0, 3), EOS),
        (BOS, *ids(3, 7)),
        (BOS, *ids(7, 9), EOS, BOS),  # the <s> of the third row: the next window has its own
        (BOS, *ids(9, 13)),
        (BOS, *ids(13, 16), EOS),
    )
    assert found.info.begins_with == ("<s>",)
    assert list(found.remarks(5))[:1] == ["every sequence begins with <s>, as the tokenizer begins a text"]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("appends_eos", [False, True])
def test_windows_hold_the_text_once_and_in_order(appends_eos: bool, pack: bool) -> None:
    rows = [words(0, 40), words(2, 9), words(5, 50)]
    found = tokenize(source(*rows, packed=not pack), a_tokenizer(bos=True, appends_eos=appends_eos), 99, 7, pack=pack)
    assert {(len(window), window[0]) for window in found.sequences} == {(7, BOS)}
    read = [token for window in found.sequences for token in window if token not in (BOS, EOS)]
    text = [*ids(0, 40), *ids(2, 9), *ids(5, 50)]
    assert read == text[: len(read)]
    assert len(text) - len(read) < 7


def test_a_tokenizer_that_adds_nothing_gives_the_windows_of_the_joined_rows_alone() -> None:
    rows = [words(0, 13), words(13, 30)]
    joined = [*ids(0, 13), EOS, *ids(13, 30), EOS]
    found = tokenize(source(*rows, packed=True), a_tokenizer(), 9, 6)
    assert found.sequences == tuple(tuple(joined[start : start + 6]) for start in range(0, 27, 6))
    expected = ";".join(",".join(map(str, window)) for window in found.sequences)
    assert found.info.fingerprint == "sha256:" + hashlib.sha256(expected.encode()).hexdigest()
    assert found.info.begins_with == ()
    assert list(found.remarks(5)) == list(found.about_text())
    assert "beginning of every sequence" not in found.identity


@pytest.mark.demo
def test_the_demo_models_text_is_what_it_was_before_windows_had_a_beginning() -> None:
    tokenizer = load_tokenizer(resolve("demo"))
    joined: list[int] = []
    for row in open_text("builtin").rows:
        joined += [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]
        if len(joined) > 5 * 300:
            break
    found = tokenize(open_text("builtin"), tokenizer, 5, 300)
    assert found.sequences == tuple(tuple(joined[start : start + 300]) for start in range(0, 1500, 300))
    assert found.info.begins_with == ()


def test_a_resumed_run_must_begin_its_sequences_alike() -> None:
    one, other = (tokenize(source(words(0, 30)), a_tokenizer(bos=bos), 2, 7, pack=True) for bos in (True, False))
    assert one.identity["beginning of every sequence"] == ["<s>"]
    assert "beginning of every sequence" not in other.identity
    assert one.taken([0]).info.begins_with == ("<s>",)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("length", [1, 2])
def test_a_length_with_no_room_behind_the_beginning_is_a_usage_error(length: int, pack: bool) -> None:
    with pytest.raises(UsageError, match=f"--sequence-length {length}: "):
        tokenize(source(words(0, 30)), a_tokenizer(bos=True), 1, length, pack=pack)
    assert tokenize(source(words(0, 30)), a_tokenizer(bos=True), 1, 3, pack=pack).sequences == ((BOS, *ids(0, 2)),)


def test_packing_needs_no_mark_of_ending() -> None:
    found = tokenize(source(words(0, 3), words(3, 8)), a_tokenizer(has_eos=False), 8, 4, pack=True)
    assert found.sequences == (ids(0, 4), ids(4, 8))


@pytest.mark.parametrize("marks", [{}, {"bos": True}, {"bos": True, "appends_eos": True}, {"has_eos": False}])
@pytest.mark.parametrize("pack", [False, True])
def test_a_row_that_is_a_book_is_read_in_pieces_and_gives_the_same_tokens(
    pack: bool, marks: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [" ".join(WORDS[(7 * row + n) % 50] for n in range(60 + row)) for row in range(3)]
    whole = tokenize(source(*rows), a_tokenizer(**marks), 50, 16, pack=pack)
    monkeypatch.setattr("kvprof.calibration.sequences.PIECE_CHARACTERS", 37)
    assert tokenize(source(*rows), a_tokenizer(**marks), 50, 16, pack=pack).sequences == whole.sequences


@pytest.mark.parametrize("pack", [False, True])
def test_of_a_book_no_more_is_read_than_is_used(pack: bool) -> None:
    read, tokenizer = [], a_tokenizer()

    class Watched:
        eos_token_id = EOS

        def __call__(self, text: str, **options: bool) -> object:
            read.append(len(text))
            return tokenizer(text, **options)

    tokenize(source("w0 w1", "w1 w2 " * 500_000), Watched(), 2, 2, pack=pack)
    assert sum(read) <= 2 * PIECE_CHARACTERS


@pytest.mark.parametrize("pack", [True, False])
def test_what_was_taken_is_written_down(pack: bool) -> None:
    found = tokenize(source(words(0, 9), words(9, 30)), a_tokenizer(), 2, 7, seed=5, pack=pack)
    assert (found.info.dataset, found.info.split, found.info.seed) == ("rows", "all", 5)
    assert (found.info.sequences, found.info.sequence_length, found.info.tokens) == (2, 7, 14)


def test_each_sequence_has_a_fingerprint_of_its_own_that_no_neighbour_changes() -> None:
    def of(*rows: str) -> tuple[str, ...]:
        found = tokenize(source(*rows), a_tokenizer(), 5, 4).info.sequence_fingerprints
        assert found is not None
        return found

    one, two = of(words(0, 4), words(4, 8))
    assert one != two
    assert of(words(4, 8), words(0, 4), words(0, 9)) == (two, one, one)  # the last is cut to four tokens


def test_the_fingerprint_is_of_the_tokens() -> None:
    def of(*rows: str, length: int = 8, sequences: int = 9) -> str:
        return str(tokenize(source(*rows), a_tokenizer(), sequences, length).info.fingerprint)

    first = of(words(0, 5), words(5, 9))
    assert first == of(words(0, 5), words(5, 9), length=16)
    others = [of(words(5, 9), words(0, 5)), of(words(0, 5)), of(words(0, 5), words(5, 9), length=3), of(words(0, 9))]
    assert len({first, *others}) == 5


def test_the_built_in_text_gives_full_windows_that_a_seed_decides() -> None:
    class Letters:
        eos_token_id = 0

        def __call__(self, row: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": list(row.encode())}

    def of(seed: int, split: str = "calibration") -> CalibrationSet:
        return tokenize(open_text("builtin", split, seed), Letters(), 4, 32, seed)

    assert [len(ids) for ids in of(0).sequences] == [32] * 4
    assert of(0) == of(0)
    assert len({of(0).info.fingerprint, of(1).info.fingerprint, of(0, "held-out").info.fingerprint}) == 3


@pytest.mark.parametrize(
    ("rows", "pack", "words_of_it"),
    [
        ([], False, "holds no text"),
        ([words(0, 1)] * 3, False, "3 rows were too short.*\n.*--pack"),
        ([words(0, 3)], True, "shorter than one window of 8 tokens.*\n.*--sequence-length"),
    ],
)
def test_text_with_nothing_to_measure_says_what_to_do(rows: list[str], pack: bool, words_of_it: str) -> None:
    with pytest.raises(CalibrationError, match=words_of_it):
        tokenize(source(*rows), a_tokenizer(), 4, 8, pack=pack)


def test_lengths_and_counts_that_make_no_sense_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="--sequences 0"):
        tokenize(source(words(0, 9)), a_tokenizer(), 0, 8)
    with pytest.raises(UsageError, match="--sequence-length 1"):
        tokenize(source(words(0, 9)), a_tokenizer(), 1, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_has_no_labels(side: str) -> None:
    (batch,) = batches([[5, 6], [7, 8, 9, 10]], 2, padding_side=side)  # type: ignore[arg-type]
    assert batch.indices == (1, 0)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]]
    assert batch.input_ids[0].tolist() == batch.labels[0].tolist() == [7, 8, 9, 10]  # unshifted
    short = slice(2, 4) if side == "left" else slice(0, 2)
    assert batch.input_ids[1, short].tolist() == batch.labels[1, short].tolist() == [5, 6]
    assert batch.labels[1][batch.attention_mask[1] == 0].tolist() == [IGNORED] * 2
    assert {tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}


def test_like_lengths_share_a_batch_longest_first() -> None:
    lengths = [3, 9, 2, 9, 5, 2, 7]
    made = list(batches([[1] * length for length in lengths], 2))
    assert [batch.indices for batch in made] == [(1, 3), (6, 4), (0, 2), (5,)]
    assert [batch.input_ids.shape for batch in made] == [(2, 9), (2, 7), (2, 3), (1, 2)]


def test_only_the_sequences_named_are_batched() -> None:
    made = list(batches([[1, 2], [3, 4, 5], [6, 7]], 2, indices=[2, 1]))
    assert [batch.indices for batch in made] == [(1, 2)]
    assert list(batches([[1, 2]], 2, indices=[])) == []


@settings(deadline=None, max_examples=60)
@given(
    sequences=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=12), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    side=st.sampled_from(["left", "right"]),
)
def test_batches_hold_every_sequence_once_and_whole(sequences: list[list[int]], batch_size: int, side: str) -> None:
    seen: dict[int, list[int]] = {}
    for batch in batches(sequences, batch_size, padding_side=side):  # type: ignore[arg-type]
        assert len(batch.indices) <= batch_size
        assert batch.attention_mask.sum(1).max() == batch.input_ids.shape[1]  # no column of padding alone
        for index, row, mask, labels in zip(
            batch.indices, batch.input_ids, batch.attention_mask, batch.labels, strict=True
        ):
            assert index not in seen
            seen[index] = row[mask == 1].tolist()
            assert labels[mask == 1].tolist() == seen[index]
            assert (labels[mask == 0] == IGNORED).all()
    assert seen == dict(enumerate(sequences))


def test_the_first_sequences_of_a_set_are_the_set_of_fewer() -> None:
    def of(sequences: int) -> CalibrationSet:
        return tokenize(source(words(0, 9), words(5, 8), "w1", words(9, 30)), a_tokenizer(), sequences, 7, seed=5)

    assert of(3).first(2) == replace(of(2), skipped=1)  # a row that only the longer set came upon
    assert of(3).first(3) == of(3).first(9) == of(3)
