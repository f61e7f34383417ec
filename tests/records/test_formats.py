"""Stored bits, by the arithmetic of the two schemes and by counting what a tensor stores."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kvprof.records.formats import CODE_BITS, Format, usual_format


@pytest.mark.parametrize(
    ("bits", "group_size", "stored"),
    [(2, 32, 3.0), (2, 64, 2.5), (2, 128, 2.25), (3, 32, 4.0), (4, 32, 5.0), (4, 128, 4.25), (8, 128, 8.25)],
)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_a_group_stores_a_scale_and_a_zero_of_16_bits_each_beside_its_codes(
    bits: int, group_size: int, stored: float, axis: Any, clip: Any
) -> None:
    assert Format(bits=bits, group_size=group_size, axis=axis, clip=clip).stored_bits(128) == stored


@pytest.mark.parametrize(
    ("bits", "head_dim", "stored"), [(2, 64, 2.25), (2, 128, 2.125), (3, 64, 3.25), (4, 256, 4.0625)]
)
def test_a_rotated_head_stores_one_scale_of_16_bits_beside_its_codes(bits: int, head_dim: int, stored: float) -> None:
    form = Format(scheme="rotated", bits=bits, group_size=head_dim, axis="token")
    assert form.stored_bits(head_dim) == form.stored_bits() == stored


def test_stored_bits_are_exact_where_floats_are_not() -> None:
    assert Format(bits=3, group_size=11, axis="channel").stored_bits() == Fraction(65, 11)


def test_a_short_last_group_of_a_head_costs_as_much_as_a_whole_one() -> None:
    # 80 channels in groups of 32: 32, 32 and 16, so three scales and three zero points.
    assert Format(bits=2, group_size=32, axis="token").stored_bits(80) == 2 + Fraction(3 * 32, 80)
    assert Format(bits=2, group_size=128, axis="token").stored_bits(80) == 2 + Fraction(32, 80)


def test_a_group_of_tokens_does_not_mind_the_head_dimension() -> None:
    assert Format(bits=2, group_size=32, axis="channel").stored_bits(80) == 3


def test_sixteen_bits_store_nothing_but_the_elements() -> None:
    for group_size in (1, 32, 128):
        form = Format(bits=16, group_size=group_size, axis="channel")
        assert form.is_full
        assert form.stored_bits() == form.stored_bits(64) == 16
        assert form.name == "full"


@given(st.sampled_from(CODE_BITS), st.integers(1, 300), st.integers(1, 300))
def test_stored_bits_are_what_one_token_of_one_head_stores(bits: int, group_size: int, head_dim: int) -> None:
    stored = sum(
        bits + (32 if channel % group_size == 0 else 0)  # each group begins with its scale and zero point
        for channel in range(head_dim)
    )
    assert Format(bits=bits, group_size=group_size, axis="token").stored_bits(head_dim) * head_dim == stored


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"bits": 2, "group_size": 64, "axis": "token"}, "int2g64"),
        ({"bits": 2, "group_size": 64, "axis": "token", "clip": "mse"}, "int2g64c"),
        ({"bits": 2, "group_size": 64, "axis": "token", "scheme": "rotated"}, "rot2"),
        ({"bits": 16, "group_size": 64, "axis": "token", "clip": "mse"}, "full"),
    ],
)
def test_a_format_has_the_short_name_that_the_design_gives_it(fields: dict[str, Any], name: str) -> None:
    assert Format(**fields).name == name


def test_scheme_and_clip_have_the_defaults_of_the_contract() -> None:
    form = Format(bits=2, group_size=64, axis="token")
    assert (form.scheme, form.clip) == ("asymmetric", "none")


@pytest.mark.parametrize("bits", [-1, 0, 7, 9, 15, 17, 32, True, 2.0, "2", None])
def test_widths_that_cannot_be_packed_are_refused(bits: Any) -> None:
    with pytest.raises(ValidationError, match="bits"):
        Format(bits=bits, group_size=32, axis="token")


@pytest.mark.parametrize("group_size", [-32, 0, True, 32.0, "32", None, 10**30])
def test_group_sizes_that_are_no_count_are_refused(group_size: Any) -> None:
    with pytest.raises(ValidationError, match="group_size"):
        Format(bits=2, group_size=group_size, axis="token")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"axis": "channel"}, "axis"),
        ({"group_size": 80}, "power of two"),
        ({"clip": "mse"}, "clip"),
        ({"scheme": "symmetric"}, "scheme"),
        ({"axis": "head"}, "axis"),
        ({"clip": None}, "clip"),
    ],
)
def test_what_the_rotated_scheme_cannot_do_is_refused(changed: dict[str, Any], word: str) -> None:
    good = {"scheme": "rotated", "bits": 2, "group_size": 64, "axis": "token"}
    Format(**good)
    with pytest.raises(ValidationError, match=word):
        Format(**{**good, **changed})


def test_formats_of_equal_fields_are_equal_and_can_key_a_dict() -> None:
    assert {Format(bits=2, group_size=32, axis="token"): 1}[Format(bits=2, group_size=32, axis="token")] == 1


def test_the_usual_format_groups_keys_by_channel_and_values_by_token_within_a_head() -> None:
    key, value = usual_format("key", 2, 128, 80), usual_format("value", 2, 128, 80)
    assert (key.axis, key.group_size) == ("channel", 128)
    assert (value.axis, value.group_size) == ("token", 80)
    assert usual_format("value", 2, 128).group_size == 128
