"""Effects survive their text to the last bit of a float32, and whatever else stands in a file is refused by name."""

from __future__ import annotations

import base64
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_factories import random_effects, scores_of_effects

from kvprof import Scores
from kvprof.errors import InvalidFile
from kvprof.records.effects import MOST_BLOCKS, block_tokens, decode, encode

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
NAMES = {"key": ("int2g64", "rot3"), "value": ("rot2",)}


@given(st.floats(0, width=32, allow_nan=False, allow_infinity=False), st.lists(numbers, min_size=1, max_size=70))
def test_effects_are_read_as_they_were_written(squares: float, sums: list[float]) -> None:
    assert decode(encode(squares, sums)).tolist() == [squares, *sums]


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9))
def test_a_number_is_rounded_to_the_nearest_float32(sums: list[float]) -> None:
    assert decode(encode(1.0, sums)).tolist()[1:] == np.array(sums, dtype=np.float32).tolist()


def test_the_text_is_little_endian_float32_in_base64() -> None:
    assert base64.b64decode(encode(2.0, [1.5, -0.25])) == struct.pack("<3f", 2.0, 1.5, -0.25)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 3.5e38, -1e300])
def test_what_no_float32_holds_is_not_written(wrong: float) -> None:
    with pytest.raises(OverflowError):
        encode(1.0, [0.0, wrong])


def text_of(*series: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(series)}f", *series)).decode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no block"),
        ("?", "not float32 in base64"),
        ("AAAA", "not float32 in base64"),
        ("é", "not float32 in base64"),
        (text_of(1.0), "no block"),
        (text_of(1.0, 2.0)[:-1], "not float32 in base64"),
        (" " + text_of(1.0, 2.0), "not float32 in base64"),
        (text_of(1.0, 2.0) + "\n", "not float32 in base64"),
        (text_of(1.0, math.nan), "not finite"),
        (text_of(1.0, 2.0, -math.inf), "not finite"),
        (text_of(math.nan, 2.0), "not finite"),
        (text_of(math.inf, 2.0), "not finite"),
        (text_of(-1.0, 2.0), "negative sum of squares"),
    ],
)
def test_a_damaged_text_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(text)


@given(st.integers(1, 10**6))
def test_no_sequence_has_more_than_so_many_blocks(counted: int) -> None:
    tokens = block_tokens(counted)
    assert math.ceil(counted / tokens) <= MOST_BLOCKS
    assert tokens == 1 or math.ceil(counted / (tokens - 1)) > MOST_BLOCKS


@pytest.fixture
def whole() -> dict[str, Any]:
    """Scores of two layers, two sequences of 7 positions in blocks of 3, as JSON."""
    scores = scores_of_effects(random_effects(2, 2, 7, names=NAMES), block_tokens=3)
    return json.loads(scores.to_text())


def damaged(whole: dict[str, Any], text: str) -> None:
    whole["layers"][1]["key"]["loss_effects"]["rot3"][1] = text


BROKEN = {
    "another number of sequences": (
        lambda whole: whole["layers"][1]["key"]["loss_effects"]["rot3"].pop(),
        ["layer 1", "key", "loss_effects[rot3]", "length 1", "2 sequences"],
    ),
    "another number of blocks": (
        lambda whole: damaged(whole, encode(1.0, [0.5, 0.5])),
        ["layer 1", "key", "loss_effects[rot3][1]", "2 blocks", "effects says 3"],
    ),
    "no base64": (lambda whole: damaged(whole, "x"), ["layer 1", "key", "loss_effects[rot3][1]", "base64"]),
    "no number": (
        lambda whole: damaged(whole, text_of(1.0, math.nan, 0.0, 0.0)),
        ["layer 1", "key", "loss_effects[rot3][1]", "not finite"],
    ),
    "negative squares": (
        lambda whole: damaged(whole, text_of(-1.0, 0.0, 0.0, 0.0)),
        ["layer 1", "key", "loss_effects[rot3][1]", "negative"],
    ),
    "a format without a loss": (
        lambda whole: [
            whole["layers"][0]["value"][field].pop("rot2")
            for field in ("loss_increase", "loss_increase_samples", "loss_increase_stderr")
        ],
        ["layer 0", "value", "loss_effects[rot2]", "loss_increase[rot2]"],
    ),
    "effects that nothing speaks of": (
        lambda whole: whole.pop("effects"),
        ["layer 0", "key", "loss_effects[int2g64]", "no effects"],
    ),
    "tokens of another number of sequences": (
        lambda whole: whole["effects"]["tokens"].append(7),
        ["effects.tokens", "length 3", "2 sequences"],
    ),
    "other tokens": (
        lambda whole: whole["effects"].update(tokens=[7, 12]),
        ["layer 0", "key", "loss_effects[int2g64][1]", "3 blocks", "effects says 4"],
    ),
    "a bandwidth of nothing": (lambda whole: whole["effects"].update(bandwidth_blocks=0), ["bandwidth_blocks"]),
    "a bandwidth beyond all blocks": (
        lambda whole: whole["effects"].update(bandwidth_blocks=MOST_BLOCKS + 1),
        ["bandwidth_blocks"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_effects_that_contradict_the_file_are_one_message(name: str, whole: dict[str, Any], tmp_path: Path) -> None:
    breaks, words = BROKEN[name]
    breaks(whole)
    file = tmp_path / "gradients.json"
    file.write_text(json.dumps(whole))
    with pytest.raises(InvalidFile) as raised:
        Scores.load(file)
    for word in words:
        assert word in str(raised.value)


def test_scores_with_effects_survive_their_file(whole: dict[str, Any], tmp_path: Path) -> None:
    scores = Scores.from_json(whole, "whole")
    file = scores.save(tmp_path / "gradients.json")
    assert Scores.load(file) == scores
    assert Scores.load(file).to_text() == scores.to_text()
