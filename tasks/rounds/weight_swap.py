"""How new weights go from the ranks that train to the rollout engines: a bucket at a time, through
memory that all see, from one machine's memory to the others', or from device to device.
"""

import time
from collections.abc import Callable
from typing import Any

from configs.schema.rollout import Rollout, SglangRollout
from kdflow_core.errors import WorkerError
from kdflow_core.workers.base import Pending
from tasks.execution.launch import Logger
from tasks.rounds.processes import RolloutRanks, RoundProcesses, TrainerRanks


class WeightSwap:
    """Swaps weights in; the two sides meet once for as long as they live."""

    def __init__(self, rollout: Rollout, processes: RoundProcesses, logger: Logger) -> None:
        self._rollout = rollout
        self._processes = processes
        self._logger = logger
        self._joined = False

    def forget(self) -> None:
        """The processes have ended."""
        self._joined = False

    def swap(self, version: int) -> None:
        """Have the engines serve the trainer's weights, as `version`. Raises WorkerError."""
        trainer, engine = self._processes.trainer, self._processes.rollout
        started = time.perf_counter()
        trainer.open_weights()
        progress = trainer.progress()
        engine.begin_weights()
        if self._broadcasts:
            self._send(progress["buckets"])
        else:
            self._share(progress["buckets"])
        served = engine.end_weights(version)
        trainer.close_weights()
        if served != {version}:
            raise WorkerError(f"the engines serve the versions {sorted(served)}, not {version}")
        seconds, size = time.perf_counter() - started, progress["bytes"] / 1e9
        self._logger.info(
            "the engine serves the weights of round %d: %.2f GB in %.2f s", version, size, seconds
        )

    @property
    def _broadcasts(self) -> bool:
        return isinstance(self._rollout, SglangRollout) and self._rollout.weights == "broadcast"

    def _share(self, count: int) -> None:
        """One bucket is written while the engines read the one before it."""
        trainer, engine = self._processes.trainer, self._processes.rollout
        bucket = trainer.bucket(0)
        for number in range(1, count + 1):
            loading = self._handed(bucket, trainer, engine)
            if number < count:
                bucket = trainer.bucket(number)
            self._processes.replies(loading)

    def _handed(
        self, bucket: dict[str, Any], trainer: TrainerRanks, engine: RolloutRanks
    ) -> Pending:
        """The engines at a bucket, which their machines have by now."""
        if self._processes.shares_memory:
            return engine.load_bucket(bucket)
        self._meet(engine.open_channel, trainer.open_channel, ranks=self._processes.num_engines)
        loading = engine.load_copy(bucket)
        trainer.send_copy(bucket)
        return loading

    def _send(self, count: int) -> None:
        trainer, engine = self._processes.trainer, self._processes.rollout
        ranks = self._processes.num_engines * self._rollout.ranks_per_replica
        self._meet(engine.join_broadcast, trainer.join_broadcast, ranks=ranks)
        for number in range(count):
            receiving = engine.receive_bucket(trainer.describe_bucket(number))
            trainer.send_bucket(number)
            self._processes.replies(receiving)

    def _meet(
        self, engines: Callable[..., Pending], sender: Callable[..., None], *, ranks: int
    ) -> None:
        """Have the trainer's rank 0 and so many `ranks` of the engines meet, unless they have."""
        if self._joined:
            return
        place = self._processes.trainer.meeting_place() | {"ranks": 1 + ranks}
        joining = engines(**place)
        sender(**place)
        self._processes.replies(joining)
        self._joined = True
