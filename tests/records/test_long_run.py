"""Is a series' long-run variance what time-series theory says it is? Against double sums, and processes that are known.

Of white noise it is the variance; of a moving average x_t = e_t + a e_(t-1) it is (1 + a)^2, of an autoregression
x_t = a x_(t-1) + e_t it is 1 / (1 - a)^2, e of variance 1.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from score_factories import encoded, random_effects, scores_of_effects

from kvprof.records.long_run import bandwidth_of, blended, effects_of, long_run, loss_of, share_of

Floats = NDArray[np.float64]

series_of = arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e3, 1e3))


def double_sum(series: Floats, bandwidth: int) -> float:
    places = range(len(series))
    return math.fsum(
        max(0.0, 1 - abs(one - other) / bandwidth) * series[one] * series[other] for one in places for other in places
    )


@given(series_of, st.integers(1, 25))
def test_squared_windows_add_up_to_the_double_sum_of_bartletts_weights(series: Floats, bandwidth: int) -> None:
    windows = long_run(series, bandwidth)
    assert windows.shape == (len(series) + bandwidth - 1,)
    scale = float(np.square(series).sum()) * bandwidth + 1e-12
    assert float(np.square(windows).sum()) == pytest.approx(double_sum(series, bandwidth), abs=1e-9 * scale)


@given(series_of, st.integers(1, 25), st.integers(1, 1000))
def test_a_loss_is_never_negative_and_is_half_of_the_double_sum_a_token(
    series: Floats, bandwidth: int, tokens: int
) -> None:
    scale = float(np.square(series).sum()) * bandwidth + 1e-12
    found = loss_of(series, bandwidth, tokens)
    assert found >= 0
    assert found == pytest.approx(0.5 * double_sum(series, bandwidth) / tokens, abs=1e-9 * scale)


def test_windows_of_many_series_are_those_of_each() -> None:
    many = np.random.default_rng(0).standard_normal((3, 2, 9))
    assert np.array_equal(long_run(many, 4)[2, 1], long_run(many[2, 1], 4))


@given(series_of, series_of, st.integers(1, 25))
def test_windows_of_a_sum_are_the_sum_of_windows(one: Floats, other: Floats, bandwidth: int) -> None:
    """What makes a plan's prediction coherent: effects of tensors may be added before or after."""
    length = min(len(one), len(other))
    one, other = one[:length], other[:length]
    np.testing.assert_allclose(
        long_run(one + other, bandwidth), long_run(one, bandwidth) + long_run(other, bandwidth), atol=1e-8
    )


def white(draw: np.random.Generator, *shape: int) -> Floats:
    return draw.standard_normal(shape)


def moving_average(draw: np.random.Generator, share: float, *shape: int) -> Floats:
    noise = draw.standard_normal((*shape[:-1], shape[-1] + 1))
    return noise[..., 1:] + share * noise[..., :-1]


def autoregression(draw: np.random.Generator, share: float, *shape: int) -> Floats:
    noise = draw.standard_normal(shape)
    noise[..., 0] /= math.sqrt(1 - share**2)
    for at in range(1, shape[-1]):
        noise[..., at] += share * noise[..., at - 1]
    return noise


@pytest.mark.parametrize("bandwidth", [1, 2, 5, 9])
def test_of_white_noise_the_long_run_variance_is_the_variance(bandwidth: int) -> None:
    found = [2 * loss_of(one, bandwidth, 50) for one in white(np.random.default_rng(1), 4000, 50)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - 1) < 3.5 * error
    assert error < 0.02


@pytest.mark.parametrize(
    ("process", "share", "known"),
    [(moving_average, 0.8, 1.8**2), (moving_average, -0.5, 0.25), (autoregression, 0.5, 4.0)],
)
def test_a_longer_bandwidth_comes_nearer_to_the_long_run_variance_of_a_known_process(
    process: object, share: float, known: float
) -> None:
    many = process(np.random.default_rng(2), share, 300, 2000)  # type: ignore[operator]
    variance = np.square(many).mean()
    means = [np.mean([2 * loss_of(one, bandwidth, 2000) for one in many]) for bandwidth in (1, 2, 8, 40)]
    assert means[0] == pytest.approx(variance)
    misses = [abs(mean - known) for mean in means]
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] < 0.05 * max(known, variance)


def formats_of(many: Floats, formats: int = 4) -> list[list[Floats]]:
    return [list(part) for part in np.split(many, formats)]


def test_the_bandwidth_grows_with_correlation() -> None:
    draw = np.random.default_rng(3)
    found = [bandwidth_of(formats_of(autoregression(draw, share, 64, 64))) for share in (0.0, 0.3, 0.6, 0.8)]
    assert found == sorted(found)
    assert found[0] <= 3 < found[2] < found[3] <= 64


def test_the_bandwidth_of_many_white_series_is_small() -> None:
    many = formats_of(white(np.random.default_rng(4), 100 * 16, 64), 100)
    assert bandwidth_of(many) <= 2


@pytest.mark.parametrize(
    "series",
    [
        [],
        [[np.zeros(40)]],
        [[np.array([3.0])], [np.array([-1.0])]],
        [[np.array([1.0, 2.0])]],
        [[np.tile([1.0, -1.0], 200)]],
    ],
    ids=["none", "all zero", "single blocks", "two blocks", "alternating"],
)
def test_series_that_tell_no_correlation_have_the_bandwidth_of_one_block(series: list[list[Floats]]) -> None:
    assert bandwidth_of(series) == 1


@given(st.lists(arrays(np.float64, st.just(12), elements=st.floats(-10, 10)), min_size=1, max_size=6))
def test_a_bandwidth_is_never_longer_than_a_sequence(rows: list[Floats]) -> None:
    assert 1 <= bandwidth_of([[row, row[:5]] for row in rows]) <= 12


@pytest.mark.parametrize("times", [1e-8, 3.0, 1e8])
def test_a_bandwidth_does_not_depend_on_the_unit_nor_on_how_large_single_formats_are(times: float) -> None:
    many = formats_of(autoregression(np.random.default_rng(5), 0.6, 32, 64))
    expected = bandwidth_of(many)
    assert bandwidth_of([[times * row for row in every] for every in many]) == expected
    assert bandwidth_of([[1e-3 * row for row in many[0]], *many[1:]]) == expected


def test_effects_that_are_rounding_alone_change_no_bandwidth_and_no_loss_of_others() -> None:
    draw = np.random.default_rng(6)
    many = formats_of(autoregression(draw, 0.6, 32, 64))
    rounding = [[1e-7 * row for row in white(draw, 8, 64)] for _ in range(20)]
    assert bandwidth_of([*many, *rounding]) == bandwidth_of(many)
    short = np.array([[np.square(row).sum() for row in every] for every in [*many, *rounding]])
    long = np.array([[np.square(long_run(row, 8)).sum() for row in every] for every in [*many, *rounding]])
    classes = np.zeros(len(short), dtype=np.int64)
    alone = blended(long[:4], short[:4], classes[:4])
    np.testing.assert_allclose(blended(long, short, classes)[:4], alone, rtol=1e-12)


positive = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(1e-3, 1e3))


@given(positive, st.data())
def test_blended_ratios_keep_the_mean_of_their_class_and_one_share_of_their_distances(
    short: Floats, data: st.DataObject
) -> None:
    long = short * data.draw(arrays(np.float64, short.shape, elements=st.floats(0.1, 10)))
    classes = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(short), max_size=len(short))))
    found = blended(long, short, classes)
    assert found.shape == short.shape
    assert (found >= 0).all()
    ratios, blends = (one.mean(axis=1) / short.mean(axis=1) for one in (long, found))
    shares = []
    for own in set(classes):
        assert blends[classes == own].mean() == pytest.approx(ratios[classes == own].mean())
        raw, new = np.log(ratios[classes == own]), np.log(blends[classes == own])
        if np.ptp(raw) > 1e-3:
            shares.append(np.ptp(new) / np.ptp(raw))
            np.testing.assert_allclose(new - new.mean(), shares[0] * (raw - raw.mean()), atol=1e-9)
    assert all(-1e-9 < share < 1 + 1e-9 for share in shares)


def test_a_single_sequence_believes_the_class_alone() -> None:
    long, short = np.array([[2.0], [6.0], [5.0]]), np.array([[1.0], [2.0], [1.0]])
    found = blended(long, short, np.array([0, 0, 1]))
    np.testing.assert_allclose(found, [[2.5], [5.0], [5.0]])


def test_effects_of_zero_lose_nothing_and_make_no_other_number_unknown() -> None:
    long, short = np.array([[0.0, 0.0], [6.0, 2.0]]), np.array([[0.0, 0.0], [2.0, 2.0]])
    found = blended(long, short, np.array([0, 0]))
    assert found[0].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(found[1], [4.0, 4.0])  # the class has one mean, and its spread is nothing
    assert blended(0 * long, 0 * short, np.array([0, 0])).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_ratios_that_differ_by_noise_alone_are_those_of_their_class() -> None:
    """64 tensors of one true ratio: blended, their losses scatter as sums of squares do, not as the long run does."""
    draw = np.random.default_rng(7)
    many = moving_average(draw, 0.8, 64, 8, 60)
    short = np.square(many).sum(axis=2)
    long = np.square(long_run(many, 6)).sum(axis=2)
    found = blended(long, short, np.zeros(64, dtype=np.int64)).mean(axis=1)
    spreads = [each.std() / each.mean() for each in (found, short.mean(axis=1), long.mean(axis=1))]
    assert spreads[0] < 1.1 * spreads[1] < 0.7 * spreads[2]
    assert found.mean() == pytest.approx(long.mean(), rel=0.02)


def test_ratios_that_truly_differ_stay_apart() -> None:
    """Errors of some tensors push one way for long, those of others do not: more text tells, and is believed."""
    draw = np.random.default_rng(8)
    lasting, passing = autoregression(draw, 0.7, 8, 200, 100), white(draw, 8, 200, 100)
    many = np.concatenate([lasting, passing])
    short, long = np.square(many).sum(axis=2), np.square(long_run(many, 10)).sum(axis=2)
    found = blended(long, short, np.zeros(16, dtype=np.int64)).mean(axis=1)
    np.testing.assert_allclose(found, long.mean(axis=1), rtol=0.05)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_share_of_noise_is_a_share(noise: float, spread: float) -> None:
    assert 0 <= share_of(noise, spread) <= 1


def test_of_independent_errors_the_loss_is_what_positions_by_themselves_say() -> None:
    """Unbiased errors, white over positions: the coherent score and half the mean square agree within their noise."""
    names = {"key": ("int2g64", "int4g64"), "value": ("rot2", "rot4")}
    effects = random_effects(3, 48, 200, seed=9, names=names)
    scores = scores_of_effects(effects, block_tokens=4)
    ratios = []
    for entry, own in zip(scores.layers, effects, strict=True):
        for tensor, formats in own.items():
            for name, series in formats.items():
                apart = np.mean([0.5 * np.square(row).mean() for row in series])
                ratios.append(entry.tensor(tensor).loss_increase[name] / apart)
    assert len(ratios) == 12
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    assert np.abs(np.array(ratios) - 1).max() < 0.2


def test_a_text_of_effects_gives_squares_and_block_sums() -> None:
    rows = [np.arange(7.0), -np.arange(4.0)]
    squares, sums = effects_of([encoded(row, 3) for row in rows])
    assert squares.tolist() == [91.0, 14.0]
    assert [one.tolist() for one in sums] == [[3.0, 12.0, 6.0], [-3.0, -3.0]]
