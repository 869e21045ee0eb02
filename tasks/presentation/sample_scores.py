"""What held-out scores are made of, by model and sample: a file beside the scores."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from configs.errors import ConfigError
from kdflow_core.eval.sample_sums import SUMS, SampleSums

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
