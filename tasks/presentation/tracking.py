"""Training metrics: JSON lines always, and what trackers are told of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs.schema.run import RunConfig
from kdflow_core.metrics import STEP_METRICS
from tasks.presentation.trackers import Tracked, trackers

METRICS_FILE = "metrics.jsonl"
HELDOUT_FILE = "heldout.jsonl"
PLOTTED = tuple(metric.name for metric in STEP_METRICS)


class MetricsLog:
    """Writes the records of a run; a resumed run first drops those after its checkpoint."""

    def __init__(
        self,
        *,
        run: RunConfig,
        folder: Path,
        run_id: str,
        first_step: int,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        kept = [r for r in read_metrics(path) if r["step"] <= first_step]
        self._file = path.open("w", encoding="utf-8")
        for record in kept:
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._heldout = folder / HELDOUT_FILE
        points = [r for r in read_metrics(self._heldout) if first_step and r["step"] <= first_step]
        self._heldout.unlink(missing_ok=True)
        for point in points:
            self._append_heldout(point)
        self._trackers = trackers(Tracked(run, run_id, folder, first_step, tell))

    def write(self, record: dict[str, Any]) -> None:
        """Append one step's record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._plot("train", {n: record[n] for n in PLOTTED if n in record}, record["step"])

    def write_round(self, figures: Mapping[str, float], step: int) -> None:
        """A round's figures for the curves; `step` is its last. Its record is kept elsewhere."""
        self._plot("round", figures, step)

    def write_heldout(self, scores: Mapping[str, float], step: int) -> None:
        """A point of the held-out curve, after `step` optimizer steps."""
        self._append_heldout({"step": step, **scores})
        self._plot("heldout", {n: v for n, v in scores.items() if n != "num_tokens"}, step)

    def _append_heldout(self, point: Mapping[str, float]) -> None:
        with self._heldout.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")

    def _plot(self, group: str, figures: Mapping[str, float], step: int) -> None:
        named = {f"{group}/{name}": value for name, value in figures.items()}
        for tracker in self._trackers:
            tracker.log(named, step)

    def close(self) -> None:
        """Flush and close all sinks."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class NoMetrics:
    """The sink of ranks other than 0."""

    def write(self, record: dict[str, Any]) -> None:
        """Drop the record."""

    def write_round(self, figures: Mapping[str, float], step: int) -> None:
        """Drop the figures."""

    def write_heldout(self, scores: Mapping[str, float], step: int) -> None:
        """Drop the scores."""

    def close(self) -> None:
        """Nothing to close."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, up to the first line that is not one: the last line of a
    killed run may be torn.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records
