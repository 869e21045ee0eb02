"""How sure means over samples are: the percentile bootstrap (Efron, 1979) over whole samples, since
the tokens of one sample belong together.

Dimensions: S samples, R resamples of them, C columns.
"""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 1000
SHARE = 0.95
AT_A_TIME = 50  # resamples, of which each is a count for every sample
LEAST_SAMPLES = 2


def mean_interval(top_S: np.ndarray, bottom_S: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of sum(`top_S`) / sum(`bottom_S`), as sums of tokens over numbers of them
    are. None where there is nothing to resample.
    """
    if len(top_S) < LEAST_SAMPLES or not bottom_S.any():
        return None
    return _interval(
        np.concatenate([_ratio(counts_RS, top_S, bottom_S) for counts_RS in _resamples(len(top_S))])
    )


def difference_interval(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float] | None:
    """The 95 % interval of the other mean minus the one, of the same samples in the same order,
    which are resampled together.
    """
    count = len(one[0])
    if count < LEAST_SAMPLES or not one[1].any() or not other[1].any():
        return None
    return _interval(
        np.concatenate(
            [_ratio(counts_RS, *other) - _ratio(counts_RS, *one) for counts_RS in _resamples(count)]
        )
    )


def _resamples(count: int) -> Iterator[np.ndarray]:
    """How often each sample is drawn, [R, S]; always the same ones."""
    rng = np.random.default_rng(0)
    for begin in range(0, RESAMPLES, AT_A_TIME):
        size = min(AT_A_TIME, RESAMPLES - begin)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size)


def _ratio(counts_RS: np.ndarray, top_S: np.ndarray, bottom_S: np.ndarray) -> np.ndarray:
    """Not a number for a resample without anything at the bottom."""
    top_R, bottom_R = counts_RS @ top_S, counts_RS @ bottom_S
    unknown_R = np.full(len(top_R), np.nan)
    ratio_R: np.ndarray = np.divide(top_R, bottom_R, out=unknown_R, where=bottom_R != 0)
    return ratio_R


def _interval(values_R: np.ndarray) -> tuple[float, float]:
    tail = (1 - SHARE) / 2
    low, high = np.nanquantile(values_R, [tail, 1 - tail])
    return float(low), float(high)
