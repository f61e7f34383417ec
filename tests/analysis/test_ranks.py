"""Is the rank correlation SciPy's, ties and all?"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from kvprof.analysis.ranks import ranks, spearman

NUMBERS = st.floats(0, 1e6) | st.sampled_from([0.0, 1.0, 2.0])  # the latter often tie


@given(st.lists(NUMBERS, max_size=30))
def test_ranks_are_scipy_s_with_ties_averaged(numbers: list[float]) -> None:
    assert ranks(numbers) == (rankdata(numbers).tolist() if numbers else [])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=30))
def test_the_correlation_is_scipy_s(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(float(spearmanr(first, second).statistic), abs=1e-9)


@given(st.lists(NUMBERS, min_size=3, max_size=20, unique=True))
def test_order_is_all_that_counts(numbers: list[float]) -> None:
    grown = [math.log1p(number) + 7 * number for number in numbers]
    assert spearman(numbers, grown) == pytest.approx(1.0)
    assert spearman(numbers, [-number for number in grown]) == pytest.approx(-1.0)


def test_two_numbers_have_no_correlation() -> None:
    assert spearman([1.0, 2.0], [3.0, 4.0]) is None
