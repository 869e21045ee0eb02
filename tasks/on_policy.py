"""An on-policy run at work: the ranks that train, the rollout engine, and what goes between them.

No Prefect here, and no tensors: those stay in the processes that are called.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from configs.schema.on_policy import OnPolicyConfig
from configs.schema.rollout import SglangRollout
from kdflow_core.errors import WorkerError
from kdflow_core.workers.local import RankGroup, free_port
from storage.artifact import ArtifactRef
from storage.lease import Pulse
from tasks.launch import KEEP_BUFFERS, QUIET, Logger, stage_lease, tell_line
from tasks.memory_plan import memory_plan, plan_lines
from tasks.progress import ProgressLog
from tasks.rounds import (
    ROUND_FILE,
    RoundRecord,
    RoundRequest,
    next_fraction,
    on_policy_count,
)
from tasks.stages import RoundKind, StageIdentity, StageSpec, open_store, round_identity

LOOPBACK = "127.0.0.1"


class OnPolicyRun:
    """Rolls out, scores and trains rounds. Its processes start when they are first needed, and
    again after one has died; then student and optimizer are at their newest checkpoint.

    Used as a context manager, in which nobody else works on the same run. Raises WorkerError when
    a process fails.
    """

    def __init__(self, spec: StageSpec, logger: Logger) -> None:
        assert spec.run.on_policy is not None
        self.spec = spec
        self.config: OnPolicyConfig = spec.run.on_policy
        self._logger = logger
        self._store = open_store(spec.run)
        self._trainer: RankGroup | None = None
        self._rollout: RankGroup | None = None
        self._served = 0
        self._begun: list[int] = []
        self._joined = False
        self._timing: dict[str, float] = {}
        self._round_started = time.perf_counter()
        self._lease = ExitStack()
        self._pulse: Pulse | None = None

    # What is done.

    def is_finished(self) -> bool:
        """Whether the trained student is there."""
        identity = self.spec.identity
        return self._store.find(identity.kind, identity.digest) is not None

    def memory_plan(self) -> list[str]:
        """What each part of a round holds, in lines for people."""
        return plan_lines(memory_plan(self.spec))

    def identity(self, kind: RoundKind, number: int) -> StageIdentity:
        """That of a round's rollouts or record."""
        return round_identity(self.spec.identity, kind, number)

    def spec_of(self, kind: RoundKind, number: int) -> StageSpec:
        """The spec of a round's task."""
        return self.spec.model_copy(update={"identity": self.identity(kind, number)})

    def find(self, kind: RoundKind, number: int) -> ArtifactRef | None:
        """An artifact of a round, where it is intact."""
        identity = self.identity(kind, number)
        return self._store.find(identity.kind, identity.digest)

    def is_trained(self, number: int) -> bool:
        """Whether a round need not be trained: its record is there, and a checkpoint behind it."""
        if self.find("round", number) is None:
            return False
        return self._checkpoint_step() >= number * self._steps

    def history(self, before: int) -> list[RoundRecord]:
        """The records of the rounds before one."""
        refs = [self.find("round", number) for number in range(1, before)]
        return [self.record(ref) for ref in refs if ref is not None]

    def record(self, ref: ArtifactRef) -> RoundRecord:
        """A round's record."""
        text = (self._store.local_copy(ref) / ROUND_FILE).read_text(encoding="utf-8")
        return RoundRecord.model_validate_json(text)

    # The tasks of a round.

    def roll_out(self, number: int) -> ArtifactRef:
        """The student's answers to a round's prompts."""
        self._timing, self._round_started = {}, time.perf_counter()
        with self._timed("rollout"):
            ref = None if number in self._begun else self.find("rollouts", number)
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
            counts: dict[str, Any] = self._train("score", request=self._request(number))[0]
        return counts

    def train(self, number: int) -> ArtifactRef:
        """The round's optimizer steps and its record. Coming rounds are rolled out beside them."""
        self._catch_up(number)
        self._roll_out_ahead(number)
        request = self._request(number)
        result = self._train("train", request=request)[0]
        seconds = {**self._timing, **result.pop("seconds")}
        seconds["round"] = time.perf_counter() - self._round_started
        seconds["idle"] = max(0.0, seconds["round"] - sum(self._parts(seconds)))
        return self._commit(number, request, result, seconds)

    def export(self) -> ArtifactRef:
        """The trained student, with the records of its rounds."""
        self._catch_up(self.config.rounds + 1)  # where the newest checkpoint was damaged
        records = [r.model_dump(mode="json") for r in self.history(self.config.rounds + 1)]
        return ArtifactRef.model_validate(self._train("export", rounds=records)[0])

    def _catch_up(self, number: int) -> None:
        """Train again what comes before a round and was lost with a trainer that has died: its
        rounds after the last checkpoint. Their answers and records are there.
        """
        if number == 1:
            return
        for lost in range(self._trained_rounds() + 1, number):
            self._logger.warning("round %d was not saved; training it again", lost)
            with self._timed("repeat"):
                self._train("train", request=self._request(lost))

    # Rolling out.

    def _begin_rollout(self, number: int) -> None:
        fraction = self._fraction(number)
        if on_policy_count(fraction, self.config.prompts_per_round):
            self._serve_newest(number)
        self._send(self._rollout_group(), "roll_out", number=number, fraction=fraction)
        self._begun.append(number)

    def _finish_rollouts(self, number: int) -> ArtifactRef:
        """Wait for the rollouts through a round's."""
        while number in self._begun:
            (plain,) = self._answers(self._rollout_group())
            self._begun.pop(0)
        return ArtifactRef.model_validate(plain)

    def _roll_out_ahead(self, number: int) -> None:
        """Begin what may be rolled out by the weights that round `number` starts from."""
        last = min(number + self.config.max_staleness, self.config.rounds)
        for ahead in range(number + 1, last + 1):
            if ahead in self._begun or self.find("rollouts", ahead) is not None:
                continue
            too_old = self._served < ahead - 1 - self.config.max_staleness
            if self._begun and too_old:
                return  # new weights have to wait for what is being rolled out
            self._begin_rollout(ahead)

    def _serve_newest(self, number: int) -> None:
        """Have the engine serve the trainer's weights, unless it is at work or does already."""
        self._rollout_group()
        if self._begun:
            return
        trained = self._trained_rounds()
        if trained < number - 1 - self.config.max_staleness:
            raise WorkerError(f"round {number} would be rolled out by the weights of {trained}")
        if self._served != trained:
            with self._timed("swap"):
                self._swap(trained)

    def _swap(self, version: int) -> None:
        rollout, started = self._rollout_group(), time.perf_counter()
        self._train("open_weights")
        progress = self._train("progress")[0]
        count = progress["buckets"]
        self._call(rollout, "begin_weights")
        if self._broadcasts():
            self._send_weights(rollout, count)
        else:
            self._share_weights(rollout, count)
        (self._served,) = self._call(rollout, "end_weights", version=version)
        self._train("close_weights")
        if self._served != version:
            raise WorkerError(f"the engine serves version {self._served}, not {version}")
        seconds, size = time.perf_counter() - started, progress["bytes"] / 1e9
        self._logger.info(
            "the engine serves the weights of round %d: %.2f GB in %.2f s", version, size, seconds
        )

    def _share_weights(self, rollout: RankGroup, count: int) -> None:
        """Bucket by bucket; one is written while the engine reads the one before it."""
        bucket = self._train("bucket", number=0)[0]
        for number in range(1, count + 1):
            self._send(rollout, "load_bucket", bucket=bucket)
            if number < count:
                bucket = self._train("bucket", number=number)[0]
            self._answers(rollout)

    def _send_weights(self, rollout: RankGroup, count: int) -> None:
        trainer = self._trainer_group()
        if not self._joined:
            assert isinstance(self.config.rollout, SglangRollout)
            where = {"address": LOOPBACK, "port": free_port()}
            ranks = 1 + self.config.rollout.tensor_parallel
            self._send(rollout, "join_broadcast", **where)
            self._train("join_broadcast", ranks=ranks, **where)
            self._answers(rollout)
            self._joined = True
        for number in range(count):
            tensors = self._train("describe_bucket", number=number)[0]
            self._send(rollout, "receive_bucket", tensors=tensors)
            self._call(trainer, "send_bucket", number=number)
            self._answers(rollout)

    def _broadcasts(self) -> bool:
        rollout = self.config.rollout
        return isinstance(rollout, SglangRollout) and rollout.weights == "broadcast"

    # The record of a round.

    def _request(self, number: int) -> dict[str, Any]:
        rollouts = self.find("rollouts", number)
        if rollouts is None:
            raise WorkerError(f"the rollouts of round {number} are gone")
        replay = self.config.replay
        earlier = range(max(1, number - replay.rounds), number) if replay else range(0)
        refs = [self.find("rollouts", k) for k in earlier]
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
        identity = self.identity("round", number)
        folder = self._store.workdir(identity.kind, identity.digest)
        (folder / ROUND_FILE).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        files = self._store.publish(identity.kind, identity.digest, folder)
        return self._store.commit(
            kind=identity.kind,
            digest=identity.digest,
            code_version=identity.code_version,
            config=identity.config,
            inputs=identity.inputs,
            files=files,
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

    def _checkpoint_step(self) -> int:
        """The newest step that a checkpoint on this machine has."""
        folder = self._store.scratch / self.spec.identity.kind / self.spec.identity.digest
        steps = [int(p.name[5:]) for p in (folder / "checkpoints").glob("step-????????")]
        return max(steps, default=0)

    def _trained_rounds(self) -> int:
        """The rounds that the trainer's weights have been through: their version."""
        return int(self._train("progress")[0]["step"]) // self._steps

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Count the time within to a part of the round, but for what other parts take of it."""
        others, started = sum(self._timing.values()), time.perf_counter()
        yield
        others = sum(self._timing.values()) - others
        spent = time.perf_counter() - started - others
        self._timing[part] = self._timing.get(part, 0.0) + spent

    # The processes.

    def _trainer_group(self) -> RankGroup:
        if self._trainer is None:
            self._trainer = self._start("trainer", self.spec.run.student.num_ranks, KEEP_BUFFERS)
        return self._trainer

    def _rollout_group(self) -> RankGroup:
        if self._rollout is None:
            self._rollout = self._start("rollout", 1, QUIET)
        return self._rollout

    def _start(self, role: str, num_ranks: int, env: dict[str, str]) -> RankGroup:
        group = RankGroup(
            module="tasks.on_policy_worker",
            num_ranks=num_ranks,
            on_event=ProgressLog(self._logger).event,
            on_line=partial(tell_line, self._logger, role),
            env=env,
            arguments=[role],
            name=role,
            stall_s=self.spec.run.stall_limit_s,
            on_beat=None if self._pulse is None else self._pulse.touch,
        )
        group.send(json.dumps({"role": role, "spec": self.spec.model_dump(mode="json")}))
        try:
            with self._timed("start"):
                self._answers(group)
        except WorkerError:
            group.close()
            raise
        return group

    def _train(self, method: str, **arguments: Any) -> list[Any]:
        return self._call(self._trainer_group(), method, **arguments)

    def _call(self, group: RankGroup, method: str, **arguments: Any) -> list[Any]:
        self._send(group, method, **arguments)
        return self._answers(group)

    def _send(self, group: RankGroup, method: str, **arguments: Any) -> None:
        group.send(json.dumps({"method": method, "arguments": arguments}))

    def _answers(self, group: RankGroup) -> list[Any]:
        try:
            return group.answers()
        except WorkerError as error:
            if error.details:
                self._logger.error(  # noqa: TRY400
                    "%s; its traceback or last output:\n%s", error, error.details
                )
            self.close()
            raise

    def close(self) -> None:
        """End all processes. What is asked for next starts them anew."""
        groups = [group for group in (self._trainer, self._rollout) if group is not None]
        self._trainer = self._rollout = None
        self._served, self._begun, self._joined = 0, [], False
        for group in groups:
            group.close()

    def __enter__(self) -> "OnPolicyRun":
        self._pulse = self._lease.enter_context(stage_lease(self.spec, self._logger))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._trainer is not None:
                self._call(self._trainer, "close")
            if kind is None and self._rollout is not None and not self._begun:
                self._call(self._rollout, "close")
        finally:
            self.close()
            self._lease.close()
