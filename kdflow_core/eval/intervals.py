"""How sure means over samples are: the percentile bootstrap (Efron, 1979) over whole samples, since
the tokens of one sample belong together.

Dimensions: S samples, R resamples of them, C columns.
"""

from collections.abc import Iterator, Sequence

import numpy as np

RESAMPLES = 1000
SHARE = 0.95
AT_A_TIME = 50  # resamples, of which each is a count for every sample
LEAST_SAMPLES = 2
Ratio = tuple[np.ndarray, np.ndarray]
Interval = tuple[float, float]


def mean_intervals(ratios: Sequence[Ratio]) -> list[Interval | None]:
    """The 95 % intervals of means of the same samples, each as (top, bottom): sum(top) /
    sum(bottom), as sums of tokens over numbers of them are. None where nothing can be resampled.
    """
    if len(ratios[0][0]) < LEAST_SAMPLES:
        return [None] * len(ratios)
    known = [bool(bottom_S.any()) for _, bottom_S in ratios]
    return _intervals(_resampled(ratios), known)


def difference_intervals(ones: Sequence[Ratio], others: Sequence[Ratio]) -> list[Interval | None]:
    """The 95 % intervals of each other mean minus the one, of the same samples in the same order,
    which are resampled together.
    """
    if len(ones[0][0]) < LEAST_SAMPLES:
        return [None] * len(ones)
    pairs = zip(ones, others, strict=True)
    known = [bool(one[1].any() and other[1].any()) for one, other in pairs]
    values_RC = _resampled([*ones, *others])
    return _intervals(values_RC[:, len(ones) :] - values_RC[:, : len(ones)], known)


def _resampled(ratios: Sequence[Ratio]) -> np.ndarray:
    """The ratios of every resample, [R, C]; not a number for one without anything at the bottom."""
    tops_SC, bottoms_SC = (np.stack(side, 1) for side in zip(*ratios, strict=True))
    parts = []
    for counts_RS in _resamples(len(tops_SC)):
        tops_RC, bottoms_RC = counts_RS @ tops_SC, counts_RS @ bottoms_SC
        unknown_RC = np.full(tops_RC.shape, np.nan)
        parts.append(np.divide(tops_RC, bottoms_RC, out=unknown_RC, where=bottoms_RC != 0))
    return np.concatenate(parts)


def _resamples(count: int) -> Iterator[np.ndarray]:
    """How often each sample is drawn, [R, S]; always the same ones."""
    rng = np.random.default_rng(0)
    for begin in range(0, RESAMPLES, AT_A_TIME):
        size = min(AT_A_TIME, RESAMPLES - begin)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size)


def _intervals(values_RC: np.ndarray, known: Sequence[bool]) -> list[Interval | None]:
    return [_interval(values_RC[:, k]) if own else None for k, own in enumerate(known)]


def _interval(values_R: np.ndarray) -> Interval:
    tail = (1 - SHARE) / 2
    low, high = np.nanquantile(values_R, [tail, 1 - tail])
    return float(low), float(high)
