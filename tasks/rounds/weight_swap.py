"""How new weights go from the ranks that train to the rollout engines: a bucket at a time, through
memory that all see, or by broadcast.
"""

import time

from configs.schema.rollout import Rollout, SglangRollout
from kdflow_core.errors import WorkerError
from tasks.execution.launch import Logger
from tasks.rounds.processes import RoundProcesses


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
        """One bucket is written while the engine reads the one before it."""
        if not self._processes.shares_memory:
            raise WorkerError(
                "on_policy.rollout.weights=tensor goes through memory that trainer and engine "
                "share, and they are on different machines; set it to broadcast",
                expected=True,
            )
        trainer, engine = self._processes.trainer, self._processes.rollout
        bucket = trainer.bucket(0)
        for number in range(1, count + 1):
            loading = engine.load_bucket(bucket)
            if number < count:
                bucket = trainer.bucket(number)
            self._processes.replies(loading)

    def _send(self, count: int) -> None:
        trainer, engine = self._processes.trainer, self._processes.rollout
        if not self._joined:
            assert isinstance(self._rollout, SglangRollout)
            place = trainer.broadcast_place()
            engines = self._processes.num_engines
            place["ranks"] = 1 + engines * self._rollout.tensor_parallel
            joining = engine.join_broadcast(**place)
            trainer.join_broadcast(**place)
            self._processes.replies(joining)
            self._joined = True
        for number in range(count):
            receiving = engine.receive_bucket(trainer.describe_bucket(number))
            trainer.send_bucket(number)
            self._processes.replies(receiving)
