"""What held-out scores are made of, by model and sample: a file beside the scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import ConfigError
from kdflow_core.eval.intervals import difference_intervals
from kdflow_core.eval.sample_sums import RATIOS, SUMS, SampleSums

SAMPLES_FILE = "samples.npz"


def write_sums(folder: Path, sums: Mapping[str, SampleSums]) -> None:
    """Write those of all models, by title."""
    arrays: dict[str, np.ndarray] = {"columns": np.array(SUMS)}
    for title, own in sums.items():
        arrays[f"{title}/digests"] = own.digests_S16
        arrays[f"{title}/sources"] = np.array(own.sources, dtype=np.str_)
        arrays[f"{title}/sums"] = own.sums_SC
    with (folder / SAMPLES_FILE).open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type] # names are ours


def read_sums(folder: Path, title: str) -> SampleSums:
    """Those of one model. Raises ConfigError for scores of an earlier version: it kept none."""
    path = folder / SAMPLES_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no scores by sample: an earlier version made it; run it again"
        )
    with np.load(path) as arrays:
        order = [arrays["columns"].tolist().index(name) for name in SUMS]
        return SampleSums(
            digests_S16=arrays[f"{title}/digests"],
            sources=arrays[f"{title}/sources"].tolist(),
            sums_SC=arrays[f"{title}/sums"][:, order],
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A run's mean minus the first run's over the samples that both were scored on: how many these
    are, the difference, and its 95 % interval.
    """

    samples: int
    value: float | None
    interval: tuple[float, float] | None

    @property
    def is_sure(self) -> bool:
        """Whether the interval is on one side of zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def differences(one: SampleSums, other: SampleSums) -> dict[str, Difference]:
    """By the names of `RATIOS`."""
    mine, theirs = _common(one, other)
    ones, others = one.ratios(mine), other.ratios(theirs)
    intervals = difference_intervals(ones, others)
    found = {}
    for name, first, second, interval in zip(RATIOS, ones, others, intervals, strict=True):
        value = None
        if first[1].any() and second[1].any():
            value = float(second[0].sum() / second[1].sum() - first[0].sum() / first[1].sum())
        found[name] = Difference(samples=len(mine), value=value, interval=interval)
    return found


def _common(one: SampleSums, other: SampleSums) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the samples that both have, in one order. Of equal samples the first counts."""
    places = [
        {bytes(digest): row for row, digest in reversed(list(enumerate(sums.digests_S16)))}
        for sums in (one, other)
    ]
    shared = [digest for digest in places[0] if digest in places[1]]
    mine, theirs = ([place[digest] for digest in shared] for place in places)
    return np.array(mine, np.int64), np.array(theirs, np.int64)
