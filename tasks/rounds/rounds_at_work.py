"""The rounds of an on-policy run at work: what is done, what comes next, and what is kept of it.

A run's rounds are opened once in the process of its flow; tasks find them by the digest of the
student that they make. No Prefect here, and no tensors: those stay in the processes.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from configs.schema.on_policy import OnPolicyConfig
from kdflow_core.errors import WorkerError
from kdflow_core.workers.base import Pending
from storage.artifact import ArtifactRef
from tasks.execution.launch import Logger, launcher_of, stage_lease
from tasks.forecast.memory import memory_lines, memory_phases
from tasks.rounds.processes import RoundProcesses
from tasks.rounds.rollout_shares import RolloutShare, publish_rollouts
from tasks.rounds.round_record import (
    ROUND_FILE,
    RoundRecord,
    RoundRequest,
    next_fraction,
    on_policy_count,
    read_rounds,
)
from tasks.rounds.weight_swap import WeightSwap
from tasks.stages.catalogue import ROLLOUTS, ROUND, RoundArtifact
from tasks.stages.checkpoint_places import fetch_checkpoints, newest_checkpoint
from tasks.stages.earlier_rounds import STUDENT, EarlierRounds
from tasks.stages.identity import StageIdentity, StageSpec, find, open_store, publish_workdir
from tasks.stages.planning import round_identity

_AT_WORK: "dict[str, RoundsAtWork]" = {}


def rounds_at_work(student: str) -> "RoundsAtWork":
    """The rounds that are open in this process and make the student with this digest.

    Raises WorkerError where there are none.
    """
    if student not in _AT_WORK:
        raise WorkerError(f"no rounds of student {student} are open in this process")
    return _AT_WORK[student]


class RoundsAtWork:
    """Rolls out, scores and trains rounds. After a process has died, student and optimizer are at
    their newest checkpoint.

    Used as a context manager, in which nobody else works on the same run. Raises WorkerError when
    a process fails.
    """

    def __init__(self, spec: StageSpec, logger: Logger) -> None:
        assert spec.run.on_policy is not None
        self.spec = spec
        self.config: OnPolicyConfig = spec.run.on_policy
        self._logger = logger
        self._store = open_store(spec.run)
        self._earlier = EarlierRounds(spec.run, self._store)
        self._processes = RoundProcesses(
            spec,
            launcher_of(spec),
            logger,
            starting=lambda: self._timed("start"),
            on_end=self._forget,
        )
        self._swap = WeightSwap(self.config.rollout, self._processes, logger)
        self._served = 0
        self._begun: dict[int, Pending] = {}
        self._timing: dict[str, float] = {}
        self._round_started = time.perf_counter()
        self._lease = ExitStack()

    # What is done.

    def is_finished(self) -> bool:
        """Whether the trained student is there."""
        return find(self.spec.run, self.spec.identity) is not None

    def memory_forecast(self) -> list[str]:
        """What each part of a round holds, in lines for people."""
        return memory_lines(memory_phases(self.spec))

    def identity(self, made: RoundArtifact, number: int) -> StageIdentity:
        """The identity of a round's rollouts or record."""
        return round_identity(self.spec.identity, made, number)

    def spec_of(self, made: RoundArtifact, number: int) -> StageSpec:
        """The spec of a round's task."""
        return self.spec.model_copy(update={"identity": self.identity(made, number)})

    @property
    def first(self) -> int:
        """The first round that is to be run; those before it are another training's."""
        return self._earlier.count + 1

    def find(self, made: RoundArtifact, number: int) -> ArtifactRef | None:
        """An artifact of a round, where it is intact."""
        if number < self.first:
            return self._earlier.find(made, number)
        return find(self.spec.run, self.identity(made, number))

    def is_trained(self, number: int) -> bool:
        """Whether a round need not be trained: its record is there, and a checkpoint behind it."""
        if self.find(ROUND, number) is None:
            return False
        return newest_checkpoint(self._store, self.spec.identity) >= number * self._steps

    def history(self, before: int) -> list[RoundRecord]:
        """The records of the rounds before one."""
        student = self._earlier.student
        others = [] if student is None else read_rounds(self._store.local_copy(student))
        refs = [self.find(ROUND, number) for number in range(self.first, before)]
        return others[: before - 1] + [self.record(ref) for ref in refs if ref is not None]

    def record(self, ref: ArtifactRef) -> RoundRecord:
        """A round's record."""
        text = (self._store.local_copy(ref) / ROUND_FILE).read_text(encoding="utf-8")
        return RoundRecord.model_validate_json(text)

    # The tasks of a round.

    def roll_out(self, number: int) -> ArtifactRef:
        """The student's answers to a round's prompts."""
        self._timing, self._round_started = {}, time.perf_counter()
        with self._timed("rollout"):
            ref = None if number in self._begun else self.find(ROLLOUTS, number)
            if ref is None:
                if number not in self._begun:
                    self._catch_up(number)
                    self._begin_rollout(number)
                ref = self._finish_rollouts(number)
        return ref

    def score(self, number: int) -> dict[str, Any]:
        """The teacher's states of a round; they stay in the ranks."""
        self._catch_up(number)
        with self._timed("score"):
            return self._processes.trainer.score(self._request(number))

    def train(self, number: int) -> ArtifactRef:
        """The round's optimizer steps and its record. Coming rounds are rolled out beside them."""
        self._catch_up(number)
        self._roll_out_ahead(number)
        request = self._request(number)
        result = self._processes.trainer.train(request)
        seconds = {**self._timing, **result.pop("seconds")}
        seconds["round"] = time.perf_counter() - self._round_started
        seconds["idle"] = max(0.0, seconds["round"] - sum(self._parts(seconds)))
        return self._commit(number, request, result, seconds)

    def export(self) -> ArtifactRef:
        """The trained student, with the records of its rounds."""
        self._catch_up(self.config.rounds + 1)  # where the newest checkpoint was damaged
        records = [r.model_dump(mode="json") for r in self.history(self.config.rounds + 1)]
        return ArtifactRef.model_validate(self._processes.trainer.export(records))

    def _catch_up(self, number: int) -> None:
        """Train again what comes before a round and was lost with a trainer that has died: its
        rounds after the last checkpoint. Their answers and records are there.
        """
        if number == 1:
            return
        if self._trained_rounds() < self.first - 1:
            raise WorkerError(
                "the checkpoints of this training are gone or damaged, also the one that it began "
                f"with; remove {self._store.workdir(STUDENT, self.spec.identity.digest)}, and that "
                "one is fetched again",
                expected=True,
            )
        for lost in range(self._trained_rounds() + 1, number):
            self._logger.warning("round %d was not saved; training it again", lost)
            with self._timed("repeat"):
                self._processes.trainer.train(self._request(lost))

    # Rolling out.

    def _begin_rollout(self, number: int) -> None:
        fraction = self._fraction(number)
        engine = self._processes.rollout
        if on_policy_count(fraction, self.config.prompts_per_round):
            self._serve_newest(number)
        self._begun[number] = engine.roll_out(number, fraction)

    def _finish_rollouts(self, number: int) -> ArtifactRef:
        """Wait for the rollouts of a round."""
        shares = [
            RolloutShare.model_validate(plain)
            for plain in self._processes.replies(self._begun[number])
        ]
        del self._begun[number]
        return publish_rollouts(self._store, self.identity(ROLLOUTS, number), number, shares)

    def _roll_out_ahead(self, number: int) -> None:
        """Begin what may be rolled out by the weights that round `number` starts from."""
        last = min(number + self.config.max_staleness, self.config.rounds)
        for ahead in range(number + 1, last + 1):
            if ahead in self._begun or self.find(ROLLOUTS, ahead) is not None:
                continue
            too_old = self._served < ahead - 1 - self.config.max_staleness
            if self._begun and too_old:
                return  # new weights have to wait for what is being rolled out
            self._begin_rollout(ahead)

    def _serve_newest(self, number: int) -> None:
        """Have the engine serve the trainer's weights, unless it is at work or does already."""
        if self._begun:
            return
        trained = self._trained_rounds()
        if trained < number - 1 - self.config.max_staleness:
            raise WorkerError(f"round {number} would be rolled out by the weights of {trained}")
        if self._served != trained:
            with self._timed("swap"):
                self._swap.swap(trained)
            self._served = trained

    # The record of a round.

    def _request(self, number: int) -> dict[str, Any]:
        rollouts = self.find(ROLLOUTS, number)
        if rollouts is None:
            raise WorkerError(f"the rollouts of round {number} are gone")
        replay = self.config.replay
        earlier = range(max(1, number - replay.rounds), number) if replay else range(0)
        refs = [self.find(ROLLOUTS, k) for k in earlier]
        manifest = self._store.manifest(rollouts.kind, rollouts.digest)
        request = RoundRequest(
            number=number,
            fraction=manifest.info["fraction"],
            rollouts=rollouts,
            replayed=tuple(ref for ref in refs if ref is not None),
        )
        return request.model_dump(mode="json")

    def _commit(
        self,
        number: int,
        request: dict[str, Any],
        result: dict[str, Any],
        seconds: dict[str, float],
    ) -> ArtifactRef:
        rollouts = RoundRequest.model_validate(request).rollouts
        info = self._store.manifest(rollouts.kind, rollouts.digest).info
        record = RoundRecord(
            number=number,
            fraction=info["fraction"],
            version=info["version"],
            staleness=number - 1 - info["version"],
            answers=rollouts.counts["answers"],
            answer_tokens=rollouts.counts["tokens"],
            mean_length=info["mean_length"],
            longest=info["longest"],
            finish_reasons=info["finish_reasons"],
            reward_mean=info["reward_mean"],
            seconds=seconds,
            **result,
        )
        identity = self.identity(ROUND, number)
        folder = self._store.workdir(identity.kind, identity.digest)
        (folder / ROUND_FILE).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        return publish_workdir(
            self._store,
            identity,
            counts={"steps": self._steps},
            info={},
            seconds=seconds["round"],
        )

    @staticmethod
    def _parts(seconds: dict[str, float]) -> Sequence[float]:
        return [s for name, s in seconds.items() if name != "round"]

    def _fraction(self, number: int) -> float:
        return next_fraction(self.config, number, self.history(number))

    @property
    def _steps(self) -> int:
        return self.config.steps(self.spec.run.student.global_batch_size)

    def _trained_rounds(self) -> int:
        """The rounds that the trainer's weights have been through: their version."""
        return self._processes.trainer.progress()["step"] // self._steps

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Count the time within to a part of the round, but for what other parts take of it."""
        others, started = sum(self._timing.values()), time.perf_counter()
        yield
        others = sum(self._timing.values()) - others
        spent = time.perf_counter() - started - others
        self._timing[part] = self._timing.get(part, 0.0) + spent

    # The processes.

    def _forget(self) -> None:
        """The processes have ended, and with them what they had begun."""
        self._served, self._begun = 0, {}
        self._swap.forget()

    def end(self) -> None:
        """End all processes. What is asked for next starts them anew."""
        self._processes.end()

    def __enter__(self) -> "RoundsAtWork":
        pulse = self._lease.enter_context(stage_lease(self.spec, self._logger))
        fetch_checkpoints(self.spec, self._logger.info)
        self._processes.beat_with(pulse.touch)
        _AT_WORK[self.spec.identity.digest] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        del _AT_WORK[self.spec.identity.digest]
        try:
            if kind is None:
                self._processes.close(engine_is_busy=bool(self._begun))
        finally:
            self._processes.end()
            self._lease.close()
