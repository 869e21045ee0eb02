"""The processes of an on-policy run, and what they can be asked for.

They start when they are first needed, and again after one has died. No Prefect here, and no
tensors: those stay in the processes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from kdflow_core.errors import WorkerError
from kdflow_core.workers.base import Launcher, Pending, Placement, WorkerGroup
from tasks.execution.launch import Listener, Logger, saving_ranks, tell_failure
from tasks.presentation.gauges import Gauges
from tasks.stages.catalogue import QUIET
from tasks.stages.identity import StageSpec

TRAINER = "trainer"


class RoundProcesses:
    """The ranks that train, and those that have a rollout engine each. Raises WorkerError when one
    of them fails; all of both have then ended.

    A start is within `starting`; `on_end` is called when all have ended.
    """

    def __init__(
        self,
        spec: StageSpec,
        launcher: Launcher,
        logger: Logger,
        *,
        starting: Callable[[], AbstractContextManager[None]],
        on_end: Callable[[], None],
    ) -> None:
        self._spec = spec
        self._launcher = launcher
        self._logger = logger
        self._starting = starting
        self._on_end = on_end
        self._pulse: Callable[[], None] = _nothing
        self._trainer: WorkerGroup | None = None
        self._rollout: WorkerGroup | None = None
        self.num_engines = 0  # of those that run

    def beat_with(self, pulse: Callable[[], None]) -> None:
        """Have `pulse` called while ranks are alive."""
        self._pulse = pulse

    @property
    def shares_memory(self) -> bool:
        """Whether trainer and engine see one another's files of memory."""
        return self._launcher.one_machine

    @property
    def trainer(self) -> "TrainerRanks":
        """The ranks that train."""
        if self._trainer is None:
            placement = Placement(name=TRAINER, num_ranks=self._spec.run.student.num_ranks)
            self._trainer = self._start("tasks.jobs.trainer_host:TrainerHost", placement)
            self._wait_until_ready(self._trainer)
        return TrainerRanks(self, self._trainer)

    @property
    def rollout(self) -> "RolloutRanks":
        """The ranks that have a rollout engine each. They start when student and teacher are built
        and, as far as they may, have left the device: SGLang goes by what it finds there.
        """
        if self._rollout is None:
            run = self._spec.run
            assert run.on_policy is not None
            ranks = run.rollout_engines(self.trainer.gpus())
            self.num_engines = ranks
            if ranks > 1:
                self._logger.info("%d rollout engines share a round's prompts", ranks)
            placement = Placement(
                name="rollout",
                num_ranks=ranks,
                devices=run.on_policy.rollout.ranks_per_replica,
                beside=TRAINER if run.engines_beside_student else None,
                env=QUIET,
            )
            self._rollout = self._start("tasks.jobs.rollout_host:RolloutHost", placement)
            self._wait_until_ready(self._rollout)
        return RolloutRanks(self, self._rollout)

    def _start(self, job: str, placement: Placement) -> WorkerGroup:
        return self._launcher.start(
            job,
            self._spec.model_dump_json(),
            placement,
            Listener(
                self._logger,
                placement.name,
                self._pulse,
                gauges=Gauges(self._spec.run, placement.name, self._logger.warning),
            ),
            stall_s=self._spec.run.stall_limit_s,
        )

    def _wait_until_ready(self, group: WorkerGroup) -> None:
        with self._starting():
            self.replies(group.call("ready"))

    def replies(self, pending: Pending) -> list[Any]:
        """Wait for a call."""
        try:
            with saving_ranks():
                return pending.replies()
        except WorkerError as error:
            tell_failure(self._logger, error)
            self.end()
            raise

    def close(self, *, engine_is_busy: bool) -> None:
        """Let the processes leave in good order; an engine at work is not waited for."""
        try:
            if self._trainer is not None:
                self._trainer.close()
            if self._rollout is not None and not engine_is_busy:
                self._rollout.close()
        finally:
            self.end()

    def end(self) -> None:
        """End all processes. What is asked for next starts them anew."""
        groups = [group for group in (self._trainer, self._rollout) if group is not None]
        self._trainer = self._rollout = None
        self._on_end()
        for group in groups:
            group.end()


class _Ranks:
    def __init__(self, processes: RoundProcesses, group: WorkerGroup) -> None:
        self._processes = processes
        self._group = group

    def _first(self, pending: Pending) -> Any:
        """Rank 0's reply."""
        return self._processes.replies(pending)[0]


class TrainerRanks(_Ranks):
    """What `TrainerHost` offers."""

    def gpus(self) -> int:
        """The GPUs of rank 0's machine."""
        gpus: int = self._first(self._group.call("gpus"))
        return gpus

    def progress(self) -> dict[str, int]:
        """Optimizer steps that are done, and the buckets and bytes of the weights."""
        done: dict[str, int] = self._first(self._group.call("progress"))
        return done

    def score(self, request: dict[str, Any]) -> dict[str, int]:
        """Have a round scored."""
        counts: dict[str, int] = self._first(self._group.call("score", request=request))
        return counts

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have a round trained; what came of it."""
        result: dict[str, Any] = self._first(self._group.call("train", request=request))
        return result

    def export(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """Have the student exported; the reference of its artifact."""
        ref: dict[str, Any] = self._first(self._group.call("export", rounds=rounds))
        return ref

    def open_weights(self) -> None:
        """Have the weights ready to be handed over."""
        self._first(self._group.call("open_weights"))

    def close_weights(self) -> None:
        """They are handed over."""
        self._first(self._group.call("close_weights"))

    def bucket(self, number: int) -> dict[str, Any]:
        """A bucket, in a file of memory."""
        bucket: dict[str, Any] = self._first(self._group.call("bucket", number=number))
        return bucket

    def describe_bucket(self, number: int) -> list[dict[str, Any]]:
        """What `send_bucket` will send."""
        tensors: list[dict[str, Any]] = self._first(
            self._group.call("describe_bucket", number=number)
        )
        return tensors

    def meeting_place(self) -> dict[str, Any]:
        """Address and port at which rank 0 can be met."""
        place: dict[str, Any] = self._first(self._group.call("meeting_place"))
        return place

    def open_channel(self, *, address: str, port: int, ranks: int) -> None:
        """Meet the engines' hosts."""
        self._first(self._group.call("open_channel", address=address, port=port, ranks=ranks))

    def send_copy(self, bucket: dict[str, Any]) -> None:
        """Send a bucket in a file of memory to them."""
        self._first(self._group.call("send_copy", bucket=bucket))

    def join_broadcast(self, *, address: str, port: int, ranks: int) -> None:
        """Meet the engine's ranks."""
        self._first(self._group.call("join_broadcast", address=address, port=port, ranks=ranks))

    def send_bucket(self, number: int) -> None:
        """Send a bucket to them."""
        self._first(self._group.call("send_bucket", number=number))


class RolloutRanks(_Ranks):
    """What `RolloutHost` offers. What is done beside the trainer gives a call to wait for."""

    def roll_out(self, number: int, fraction: float) -> Pending:
        """Answer a round's prompts; each replies with its share."""
        return self._group.call("roll_out", number=number, fraction=fraction)

    def begin_weights(self) -> None:
        """New weights will come."""
        self._first(self._group.call("begin_weights"))

    def load_bucket(self, bucket: dict[str, Any]) -> Pending:
        """Take a bucket from a file of memory."""
        return self._group.call("load_bucket", bucket=bucket)

    def open_channel(self, *, address: str, port: int, ranks: int) -> Pending:
        """Meet the trainer's rank 0, each with its host's memory."""
        return self._group.call("open_channel", address=address, port=port, ranks=ranks)

    def load_copy(self, bucket: dict[str, Any]) -> Pending:
        """Take a bucket that it sends there."""
        return self._group.call("load_copy", bucket=bucket)

    def join_broadcast(self, *, address: str, port: int, ranks: int) -> Pending:
        """Meet the trainer's rank 0, each rank of the engines with its device."""
        return self._group.call("join_broadcast", address=address, port=port, ranks=ranks)

    def receive_bucket(self, tensors: list[dict[str, Any]]) -> Pending:
        """Take a bucket that it sends."""
        return self._group.call("receive_bucket", tensors=tensors)

    def end_weights(self, version: int) -> set[int]:
        """Serve the new weights; the versions that the engines report."""
        return set(self._processes.replies(self._group.call("end_weights", version=version)))


def _nothing() -> None:
    """Tell nobody."""
