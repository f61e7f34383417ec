"""What a --data value says: which text, and how much of it."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprof.calibration.spec import Ingredient, exact_weight, parse_data
from kvprof.errors import UsageError


@pytest.mark.parametrize(
    ("value", "name", "weight"),
    [
        ("builtin", "builtin", "1"),
        ("self", "self", "1"),
        ("self:2", "self", "2"),
        ("my.jsonl:0.5", "my.jsonl", "1/2"),
        ("my.jsonl:.25", "my.jsonl", "1/4"),
        ("my.jsonl:3.", "my.jsonl", "3"),
        ("my.jsonl:1e-1", "my.jsonl", "1/10"),
        ("my.jsonl:+2", "my.jsonl", "2"),
        ("org/name", "org/name", "1"),
        ("org/name:2", "org/name", "2"),
        ("/data/a b.txt:2", "/data/a b.txt", "2"),
        ("~/rows.txt", "~/rows.txt", "1"),
        (r"C:\texts\rows.txt", r"C:\texts\rows.txt", "1"),
        (r"C:\texts\rows.txt:2", r"C:\texts\rows.txt", "2"),
        ("C:/texts/rows.txt", "C:/texts/rows.txt", "1"),
        ("C:rows.txt", "C:rows.txt", "1"),
        ("part 1:of 2.txt", "part 1:of 2.txt", "1"),
        ("part 1:of 2.txt:7", "part 1:of 2.txt", "7"),
        ("1:2.txt", "1:2.txt", "1"),
        ("https://host/rows.txt", "https://host/rows.txt", "1"),
        ("a:b/c", "a:b/c", "1"),
    ],
)
def test_a_number_behind_the_last_colon_is_a_weight_and_no_other_colon_is(value: str, name: str, weight: str) -> None:
    assert parse_data([value]) == (Ingredient(name, Fraction(weight)),)


def test_several_texts_keep_their_order() -> None:
    assert [ingredient.name for ingredient in parse_data(["self", "b.txt:2", "builtin", "a.txt"])] == [
        "self",
        "b.txt",
        "builtin",
        "a.txt",
    ]


@pytest.mark.parametrize("weight", ["0", "-1", "-0", "nan", "NaN", "inf", "-inf", "Infinity", "1e999", "1e-999"])
def test_a_weight_that_is_not_above_zero_and_finite_says_what_one_is(weight: str) -> None:
    with pytest.raises(UsageError, match=rf"self:{weight}: a weight is a number above zero.*\n.*leave it out"):
        parse_data(["builtin", f"self:{weight}"])


def test_a_weight_of_a_thousand_million_digits_takes_no_time() -> None:
    for weight in ("1e999999999", "1e-999999999", "0e999999999"):
        with pytest.raises(UsageError):
            parse_data([f"self:{weight}"])


@pytest.mark.parametrize("tail", ["", "two", "0,5", "50%", "1/2", "2x", "1_0", "٣", "0x2", " 2"])
@pytest.mark.parametrize("name", ["builtin", "my.jsonl", "org"])
def test_a_weight_that_is_no_number_says_how_to_write_one(name: str, tail: str) -> None:
    if "/" in tail:
        return  # a path
    with pytest.raises(UsageError, match=rf"is no number.*\n.*{name}:2 or {name}:0.5"):
        parse_data([f"{name}:{tail}"])


@pytest.mark.parametrize("value", ["", " ", ":2", " :2"])
def test_a_text_without_a_name_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="names no text"):
        parse_data([value])
    with pytest.raises(UsageError, match="names no text"):
        parse_data([])


@pytest.mark.parametrize(
    "values", [["builtin", "builtin"], ["self:2", "builtin", "self"], ["org/name", "org/name:3"], ["a.txt", "./a.txt"]]
)
def test_a_text_that_is_named_twice_is_offered_a_weight(values: list[str]) -> None:
    with pytest.raises(UsageError, match=r"twice.*\n.*:2"):
        parse_data(values)


def test_two_names_of_one_file_are_one_text(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "a.txt").write_text("a\n")
    os.symlink(in_tmp / "a.txt", in_tmp / "b.txt")
    monkeypatch.setenv("HOME", str(in_tmp))
    for other in ("b.txt", str(in_tmp / "a.txt"), "~/a.txt"):
        with pytest.raises(UsageError, match="twice"):
            parse_data(["a.txt", other])


def test_a_file_that_is_there_needs_no_known_kind_to_be_told_from_a_weight(in_tmp: Path) -> None:
    (in_tmp / "rows:of mine").touch()
    assert parse_data(["rows:of mine"])[0].name == "rows:of mine"  # open_text says what it is not


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_weight_survives_being_written_down(number: float) -> None:
    assert float(exact_weight(number)) == number
    (ingredient,) = parse_data([f"self:{number!r}"])
    assert ingredient.weight == exact_weight(float(ingredient.weight))
    assert math.isclose(ingredient.weight, number)
