"""Where figures of a training go besides its own files: each kind is one class and one field.

A tracker that cannot be reached costs its curves, never the training.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from configs.errors import ConfigError
from configs.schema.run import RunConfig, TrackingConfig
from configs.secrets import public_config
from kdflow_core.workers.rank_side import emit, is_launched
from tasks.presentation.gauges import FIGURES, Gauges

MOST_CHARACTERS = 6000  # of a field's value in MLflow


class Tracked(NamedTuple):
    """A training: its run, the digest of its artifact, the folder of its files, and the step that
    it begins with, 0 or that of its checkpoint; and who is told what has gone wrong.
    """

    run: RunConfig
    digest: str
    folder: Path
    first_step: int
    tell: Callable[[str], None]


class Tracker(Protocol):
    """One place where figures go."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures by name, `train/loss` say, after a step."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class TensorBoard:
    """Event files beside the metrics."""

    def __init__(self, training: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional

        folder = str(training.folder / "tensorboard")
        self._board: Any = SummaryWriter(folder, purge_step=training.first_step + 1)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        if not all(name.startswith("train/") for name in figures):  # few, and awaited
            self._board.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._board.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project, found again by the artifact's digest."""

    def __init__(self, training: Tracked) -> None:
        import wandb  # noqa: PLC0415 - optional

        self._run: Any = wandb.init(
            project=training.run.tracking.wandb_project,
            id=training.digest,
            name=training.run.name,
            dir=str(training.folder),
            resume="allow",
            config=public_config(training.run),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Mlflow:
    """A run of an MLflow experiment, found again by a tag; the server is `MLFLOW_TRACKING_URI`."""

    TAG = "kdflow_artifact"
    MOST_PARAMS = 100  # that MLflow takes at a time
    MOST_AWAITED = 100  # sendings, the last ones, whose outcome is asked for at the end

    def __init__(self, training: Tracked) -> None:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415 - optional
        from mlflow.tracking import MlflowClient  # noqa: PLC0415 - optional

        self._errors, self._tell = MlflowException, training.tell
        self._client: Any = MlflowClient()
        self._run_id: str | None = None
        self._sent: deque[Any] = deque(maxlen=self.MOST_AWAITED)
        try:
            experiment = self._experiment(str(training.run.tracking.mlflow_experiment))
            self._run_id = self._found(experiment, training) or self._begun(experiment, training)
        except MlflowException as error:
            self._problem(error)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _found(self, experiment: str, training: Tracked) -> str | None:
        wanted = f"tags.{self.TAG} = '{training.digest}'"
        runs = self._client.search_runs([experiment], wanted, max_results=1)
        if not runs:
            return None
        self._client.update_run(runs[0].info.run_id, status="RUNNING")
        return str(runs[0].info.run_id)

    def _begun(self, experiment: str, training: Tracked) -> str:
        tags = {self.TAG: training.digest}
        run = self._client.create_run(experiment, run_name=training.run.name, tags=tags)
        from mlflow.entities import Param  # noqa: PLC0415 - optional

        fields = [Param(name, value) for name, value in _fields(public_config(training.run))]
        for begin in range(0, len(fields), self.MOST_PARAMS):
            part = fields[begin : begin + self.MOST_PARAMS]
            self._client.log_batch(run.info.run_id, params=part)
        return str(run.info.run_id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`; sent in the background."""
        if self._run_id is None:
            return
        from mlflow.entities import Metric  # noqa: PLC0415 - optional

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        self._sent.append(self._client.log_batch(self._run_id, metrics=metrics, synchronous=False))

    def close(self) -> None:
        """See `Tracker`."""
        if self._run_id is None:
            return
        try:
            for sent in self._sent:
                sent.wait()
            self._client.set_terminated(self._run_id)
        except self._errors as error:
            self._problem(error)

    def _problem(self, error: Exception) -> None:
        self._tell(f"MLflow does not have all figures of this training: {error}")


def _fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a config by their dotted names, as text of a length that MLflow keeps."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:MOST_CHARACTERS]


class Trackio:
    """A run of a trackio project; a Space of the hub where `TRACKIO_SPACE_ID` names one."""

    def __init__(self, training: Tracked) -> None:
        import trackio  # noqa: PLC0415 - optional

        self._run: Any = trackio.init(
            project=str(training.run.tracking.trackio_project),
            name=f"{training.run.name}-{training.digest[:8]}",
            resume="allow",
            config=public_config(training.run),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Prometheus:
    """The last figures for the process that started these ranks, which answers at the port; for a
    rank that somebody else has started, at its own.
    """

    def __init__(self, training: Tracked) -> None:
        self._own = None if is_launched() else Gauges(training.run, "train", training.tell)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        event = {"event": FIGURES, "figures": {**figures, "step": step}}
        if self._own is None:
            emit(event)
        else:
            self._own.event(event)

    def close(self) -> None:
        """See `Tracker`."""


class _Kind(NamedTuple):
    """A kind of tracker: the field that asks for it, what makes it, and the module and the package
    that it needs.
    """

    field: str
    make: Callable[[Tracked], Tracker]
    module: str
    package: str


KINDS = (
    _Kind("tensorboard", TensorBoard, "tensorboard", "tensorboard"),
    _Kind("wandb_project", WeightsAndBiases, "wandb", "wandb"),
    _Kind("mlflow_experiment", Mlflow, "mlflow", "mlflow-skinny"),
    _Kind("trackio_project", Trackio, "trackio", "trackio"),
    _Kind("prometheus_port", Prometheus, "prometheus_client", "prometheus-client"),
)


def _asked(config: TrackingConfig) -> list[_Kind]:
    return [kind for kind in KINDS if getattr(config, kind.field)]


def check_tracking(run: RunConfig) -> None:
    """Refuse a tracker that is asked for and not installed. Raises ConfigError."""
    for kind in _asked(run.tracking):
        if find_spec(kind.module) is None:
            given = getattr(run.tracking, kind.field)
            raise ConfigError(
                f"tracking.{kind.field}={given!r} needs the package {kind.package}: pip install "
                f"{kind.package}, or leave the field out"
            )


def trackers(training: Tracked) -> list[Tracker]:
    """All that a run asks for."""
    return [kind.make(training) for kind in _asked(training.run.tracking)]
