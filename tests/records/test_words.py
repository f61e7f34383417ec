"""Are layers read as people write them, and written as people read them?"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprof.errors import UsageError
from kvprof.records.words import counted, layers_text, read_layers, runs_of


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 bits"), (1, "1 bit"), (2, "2 bits"), (8192, "8,192 bits")], ids=str
)
def test_one_thing_is_one_thing_and_none_are_many(number: int, said: str) -> None:
    assert counted(number, "bit") == said


def test_runs_of_layers_are_shortened() -> None:
    assert layers_text([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"
    assert layers_text([4]) == "layer 4"


@given(st.sets(st.integers(0, 300), min_size=1))
def test_what_is_written_of_layers_reads_as_these_layers(layers: set[int]) -> None:
    written = layers_text(sorted(layers)).split(" ", 1)[1]
    assert {layer for run in read_layers(written, "--layers") for layer in run} == layers
    runs = runs_of(layers)
    assert {layer for first, last in runs for layer in range(first, last + 1)} == layers
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(runs))  # none touch


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x", "cannot read 'x'"),
        ("", "cannot read ''"),
        ("1,,2", "cannot read ''"),
        ("-1", "cannot read '-1'"),
        ("1.5", "cannot read '1.5'"),
        ("٣", "cannot read"),
        ("5-3", "5-3 runs backwards; write 3-5"),
        ("1" * 10, "cannot read"),
    ],
)
def test_what_names_no_layer_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        read_layers(text, "--layer")
    assert str(caught.value).startswith(f"--layer {text!r}: ")
