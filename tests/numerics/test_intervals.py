"""Intervals of means over samples against SciPy's bootstrap, and whether they hold."""

import numpy as np
import pytest
import scipy.stats

from kdflow_core.eval.intervals import Interval, difference_intervals, mean_intervals


def mean_interval(top_S: np.ndarray, bottom_S: np.ndarray) -> Interval | None:
    return mean_intervals([(top_S, bottom_S)])[0]


def sums(seed: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Of samples of very different lengths, whose tokens are alike within a sample."""
    rng = np.random.default_rng(seed)
    tokens_S = rng.integers(1, 200, samples).astype(float)
    return tokens_S * rng.gamma(2.0, 0.5, samples), tokens_S


def test_it_is_scipys_percentile_bootstrap() -> None:
    top_S, tokens_S = sums(0, 300)
    expected = scipy.stats.bootstrap(
        (top_S, tokens_S),
        lambda top, tokens: top.sum() / tokens.sum(),
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = mean_interval(top_S, tokens_S)
    assert found is not None
    width = expected.high - expected.low
    np.testing.assert_allclose(found, expected, atol=0.08 * width)


def test_it_holds_the_true_mean_about_as_often_as_it_says() -> None:
    """The mean of the gamma distribution is 1, whatever the lengths."""
    hits = 0
    for seed in range(200):
        low, high = mean_interval(*sums(seed, 150)) or (np.nan, np.nan)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_of_the_same_samples_a_small_difference_is_sure() -> None:
    """Though the intervals of both means are wide and lie over one another."""
    top_S, tokens_S = sums(3, 200)
    better_S = 0.97 * top_S
    one, other = mean_interval(top_S, tokens_S), mean_interval(better_S, tokens_S)
    assert one is not None
    assert other is not None
    assert other[1] > one[0]
    (difference,) = difference_intervals([(top_S, tokens_S)], [(better_S, tokens_S)])
    assert difference is not None
    assert difference[1] < 0
    assert difference[0] < -0.03 * (top_S.sum() / tokens_S.sum()) < difference[1]


@pytest.mark.parametrize("count", [0, 1])
def test_too_little_has_no_interval(count: int) -> None:
    assert mean_interval(np.ones(count), np.ones(count)) is None
    assert mean_interval(np.ones(5), np.zeros(5)) is None
    assert difference_intervals([(np.ones(3), np.zeros(3))], [(np.ones(3), np.ones(3))]) == [None]
