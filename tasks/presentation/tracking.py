"""Training metrics: JSON lines always, TensorBoard and Weights & Biases by config."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema.run import RunConfig
from configs.secrets import public_config
from kdflow_core.metrics import STEP_METRICS

METRICS_FILE = "metrics.jsonl"
HELDOUT_FILE = "heldout.jsonl"
PLOTTED = tuple(metric.name for metric in STEP_METRICS)


def check_tracking(run: RunConfig) -> None:
    """Refuse a tracker that is asked for and not installed. Raises ConfigError."""
    if run.tracking.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"tracking.wandb_project={run.tracking.wandb_project!r} needs the package wandb: "
            "pip install wandb, or leave the field out"
        )


class MetricsLog:
    """Writes the records of a run; a resumed run first drops those after its checkpoint."""

    def __init__(self, *, run: RunConfig, folder: Path, run_id: str, first_step: int) -> None:
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
        self._board: Any = None
        self._wandb: Any = None
        if run.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if run.tracking.wandb_project:
            import wandb  # noqa: PLC0415 - optional

            self._wandb = wandb.init(
                project=run.tracking.wandb_project,
                id=run_id,
                name=run.name,
                dir=str(folder),
                resume="allow",
                config=public_config(run),
            )

    def write(self, record: dict[str, Any]) -> None:
        """Append one step's record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        plotted = [name for name in PLOTTED if name in record]
        if self._board is not None:
            for name in plotted:
                self._board.add_scalar(f"train/{name}", record[name], record["step"])
        if self._wandb is not None:
            self._wandb.log({f"train/{n}": record[n] for n in plotted}, step=record["step"])

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
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{group}/{name}", value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log({f"{group}/{n}": value for n, value in figures.items()}, step=step)

    def close(self) -> None:
        """Flush and close all sinks."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


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
