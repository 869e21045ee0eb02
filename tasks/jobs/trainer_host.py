"""The ranks that hold student and teacher of an on-policy run between calls."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.schema.on_policy import OnPolicyConfig
from configs.schema.teacher import InProcessTeacher
from kdflow_core.alignment.translation import Translated
from kdflow_core.allocator import keep_large_blocks
from kdflow_core.contracts import Examples, SignalSource, TeacherAtHand
from kdflow_core.errors import TrainingError
from kdflow_core.loops.rounds import RoundSettings, RoundTrainer
from kdflow_core.models.folders import context_length
from kdflow_core.models.loading import DTYPES
from kdflow_core.student.publish import WeightPublisher
from kdflow_core.student.schedule import BatchSchedule
from kdflow_core.student.sleeping import StudentOffload
from kdflow_core.weight_buckets import Bucket
from kdflow_core.weight_channel import WeightChannel
from kdflow_core.workers.base import RankContext, offered
from kdflow_core.workers.ports import free_port
from kdflow_core.workers.rank_side import stoppable
from storage.sealed import is_whole, seal
from tasks.jobs import aligning, parts
from tasks.jobs.round_examples import RoundExamples, round_examples
from tasks.jobs.stage_host import open_stage
from tasks.jobs.stage_run import StageRun
from tasks.jobs.stored import StoredStates
from tasks.jobs.student_module import loss_spec
from tasks.jobs.training_session import (
    TrainingSession,
    live_states,
    teacher_engine,
    teacher_sequences,
)
from tasks.presentation.tracking import METRICS_FILE, read_metrics
from tasks.rounds.round_record import ROUNDS_FILE, RoundRequest, round_figures


class TrainerHost:
    """Scores and trains rounds, and hands over weights, as every rank is asked to."""

    def __init__(self, context: RankContext, spec: str) -> None:
        if context.num_ranks == 1:
            keep_large_blocks()
        stage = open_stage(context, spec)
        run = stage.run
        assert run.on_policy is not None
        parts.join(stage)
        self._stage = stage
        self._config: OnPolicyConfig = run.on_policy
        self._steps = run.on_policy.steps(run.student.global_batch_size)
        tables = stage.tables()
        self._table = tables["train"]
        self._translator = aligning.translator(stage)
        teacher = parts.stored_teacher(stage)
        self._session = TrainingSession(
            stage,
            teachers={"teacher": teacher} if run.algorithm.reads_signals else {},
            num_steps=self._steps * run.on_policy.rounds,
            heldout=tables["heldout"],
            judged_by=teacher,
        )
        self._rounds = self._round_trainer(teacher)
        if self._session.best is not None:
            self._session.restore_best(self._measured() if context.rank == 0 else [])
        lora = run.student.lora
        self._publisher = WeightPublisher(
            self._session.module.model,
            dtype=DTYPES[self._config.rollout.dtype],
            bucket_bytes=self._config.rollout.bucket_mb * 10**6,
            checkpoint_names=self._config.rollout.type == "sglang",
            lora_scale=lora.scale if lora else 1.0,
        )
        self._group: Any = None
        self._channel: WeightChannel | None = None
        self._translated: Translated | None = None

    def _round_trainer(self, teacher: TeacherAtHand[StoredStates]) -> RoundTrainer:
        session, run = self._session, self._stage.run
        self._sleeper = StudentOffload(session.module, session.trainer.optimizers, session.device)
        if run.student.sleep:  # the teacher comes next
            self._sleeper.sleep()
        return RoundTrainer(
            trainer=session.trainer,
            measuring=session.measuring,
            measure_heldout=session.measure_heldout,
            make_signals=self._live_signals(teacher) if run.algorithm.reads_signals else None,
            sleeper=self._sleeper if run.student.sleep else None,
            spec=loss_spec(run, session.module.head_part, session.folding),
            settings=RoundSettings(
                steps=self._steps,
                global_batch_size=run.student.global_batch_size,
                division=session.division,
                seed=run.seed,
                temperature=self._config.temperature,
            ),
        )

    def _live_signals(self, teacher: TeacherAtHand[StoredStates]) -> "_LiveSignals":
        run = self._stage.run
        held = context_length(self._stage.model_folder("teacher"))
        return _LiveSignals(self._stage, teacher, self._steps, min(run.data.max_length, held))

    def _measured(self) -> list[dict[str, Any]]:
        """What the rounds that the student has been through found on held-out samples."""
        found = []
        for number in range(1, self._config.rounds + 1):
            path = self._figures(number)
            if self._rounds.is_trained(number) and is_whole(path):
                figures = json.loads(path.read_text(encoding="utf-8"))
                if figures["heldout"] is not None:
                    found.append({**figures["heldout"], "step": figures["last_step"]})
        return found

    def _figures(self, number: int) -> Path:
        """Where the figures of a round are."""
        return self._stage.workdir / "rounds" / f"{number:06d}.json"

    @offered
    def ready(self) -> None:
        """Reply once the host is built."""

    @offered
    def gpus(self) -> int:
        """How many this machine has."""
        return torch.cuda.device_count()

    @offered
    def progress(self) -> dict[str, int]:
        """How many optimizer steps are done, and the size of the weights to hand over."""
        publisher = self._publisher
        return {
            "step": self._rounds.step,
            "buckets": publisher.num_buckets,
            "bytes": publisher.num_bytes,
        }

    # The round.

    @offered
    def score(self, request: dict[str, Any]) -> dict[str, int]:
        """The teacher's signals for all that the round trains on; they stay here."""
        wanted = RoundRequest.model_validate(request)
        return self._rounds.score(wanted.number, self._examples(wanted))

    def _examples(self, wanted: RoundRequest) -> RoundExamples:
        examples = round_examples(self._stage, self._table, wanted, self._translator)
        if self._translator is not None and dist.get_rank() == 0:
            self._translated = self._translator.count(examples.sampled, "student")
            aligning.tell_shortened(self._stage, self._translated)
        return examples

    @offered
    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """The round's optimizer steps, as far as they are not done; what came of them."""
        wanted = RoundRequest.model_validate(request)
        number = wanted.number
        done = self._figures(number)
        if self._rounds.is_trained(number):
            if not is_whole(done):
                raise TrainingError(
                    f"the figures of round {number} in {done} are damaged; remove "
                    f"{self._stage.workdir}, and the run trains its rounds again"
                )
            kept: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            return kept
        with stoppable():
            metrics = self._session.metrics
            figures = self._rounds.train(number, lambda: self._examples(wanted), metrics)
        result = figures.plain() | self._means(figures.last_step)
        result["translated"] = None if self._translated is None else asdict(self._translated)
        if dist.get_rank() == 0:
            done.parent.mkdir(exist_ok=True)
            done.write_text(json.dumps(result), encoding="utf-8")
            seal(done)
        info = self._stage.store.manifest(wanted.rollouts.kind, wanted.rollouts.digest).info
        self._session.metrics.write_round(round_figures(result, info), figures.last_step)
        saving = time.perf_counter()
        if figures.heldout is not None:
            self._session.hold_if_best(asdict(figures.heldout))
        if number % self._config.checkpoint_rounds == 0 or number == self._config.rounds:
            self._session.trainer.save()  # once it is on the disk, the round counts as trained
        result["seconds"]["save"] = time.perf_counter() - saving
        return result

    def _means(self, last_step: int) -> dict[str, float]:
        """Loss and divergence over the steps of the round that ends with a step."""
        if dist.get_rank() != 0:
            return {}
        records = read_metrics(self._session.output / METRICS_FILE)
        first = last_step - self._steps
        mine = [r for r in records if first < r["step"] <= last_step]
        steps = np.diff([first, *[r["step"] for r in mine]])  # that each record is of
        return {
            name: float(np.average([r[name] for r in mine], weights=steps))
            for name in ("loss", "kd")
        }

    # The weights.

    @offered
    def open_weights(self) -> None:
        """Get ready to hand them over."""
        if self._stage.run.student.sleep:
            self._sleeper.bring_weights()

    @offered
    def bucket(self, number: int) -> dict[str, Any] | None:
        """One bucket, in a file (rank 0's reply says which)."""
        bucket = self._publisher.write(number)
        return None if bucket is None else asdict(bucket)

    @offered
    def describe_bucket(self, number: int) -> list[dict[str, Any]]:
        """What `send_bucket` will send."""
        return self._publisher.describe(number)

    @offered
    def meeting_place(self) -> dict[str, Any]:
        """Address and port at which other groups can meet rank 0, by rank 0's reply."""
        address = self._stage.context.address
        return {"address": address, "port": free_port(address)}

    @offered
    def open_channel(self, address: str, port: int, ranks: int) -> None:
        """Have rank 0 meet the engines' hosts."""
        if dist.get_rank() == 0:
            self._channel = WeightChannel(address, port, rank=0, ranks=ranks)

    @offered
    def send_copy(self, bucket: dict[str, Any]) -> None:
        """Have rank 0 send a bucket that `bucket` has written to the engines' hosts."""
        if self._channel is not None:
            self._channel.pass_on(Bucket.from_plain(bucket))

    @offered
    def join_broadcast(self, address: str, port: int, ranks: int) -> None:
        """Meet the engine's ranks."""
        if dist.get_rank() == 0:
            from kdflow_core.sglang_runtime.engine import join_as_sender  # noqa: PLC0415 - 10 s

            self._group = join_as_sender(address, port, ranks, self._session.device)

    @offered
    def send_bucket(self, number: int) -> None:
        """Send one bucket to the engine's ranks."""
        self._publisher.broadcast(number, self._group, self._session.device)

    @offered
    def close_weights(self) -> None:
        """They are handed over."""
        self._rounds.leave_device()

    # The end.

    @offered
    def export(self, rounds: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The trained student as an artifact, with the records of its rounds; rank 0 replies with
        its reference.
        """
        self._sleeper.wake()
        counts = {"steps": self._rounds.step, "rounds": self._config.rounds}
        ref = self._session.finish(counts, files={ROUNDS_FILE: rounds})
        return None if ref is None else ref.model_dump(mode="json")

    def close(self) -> None:
        """What is saved is on the disk."""
        self._session.trainer.wait()


class _LiveSignals:
    """The signals of a round, by the teacher in these ranks."""

    def __init__(
        self, stage: StageRun, teacher: TeacherAtHand[StoredStates], steps: int, longest: int
    ) -> None:
        self._stage, self._head, self._steps = stage, teacher.head, steps
        self._engine = teacher_engine(stage, teacher.head, longest)
        if isinstance(stage.run.teacher, InProcessTeacher) and stage.run.teacher.sleep:
            self._engine.sleep()  # the rollout engine comes next

    def __call__(self, examples: Examples, schedule: BatchSchedule) -> SignalSource:
        teacher = self._stage.run.teacher
        assert isinstance(teacher, InProcessTeacher)

        return live_states(
            self._stage,
            engine=self._engine,
            head=self._head,
            sequences_of=lambda step, rank: teacher_sequences(schedule, examples, step, rank),
            num_steps=self._steps,
            steps_at_once=teacher.forward_batches or self._steps,
        )
