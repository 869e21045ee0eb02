"""The ranks that hold student and teacher of an on-policy run."""

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from configs.schema.algorithm import VanillaKDConfig
from configs.schema.on_policy import OnPolicyConfig
from configs.schema.teacher import InProcessTeacher
from kdflow_core.algorithms.base import Algorithm, Ingredients
from kdflow_core.algorithms.vanilla_kd import VanillaKD
from kdflow_core.contracts import Example, TeacherEngine, TokenSequence
from kdflow_core.errors import TrainingError
from kdflow_core.loops.measure import Measuring, heldout_scores, log_prob_difference
from kdflow_core.loops.trainer import Trainer
from kdflow_core.losses.reverse_kl import ReverseKL
from kdflow_core.models.folders import context_length
from kdflow_core.models.loading import DTYPES
from kdflow_core.student.export import export_student
from kdflow_core.student.offload import StudentOffload
from kdflow_core.student.plan import TrainingPlan
from kdflow_core.student.publish import WeightPublisher
from kdflow_core.teacher import build_engine
from kdflow_core.teacher.live import LiveStates
from storage.sealed import is_whole, seal
from tasks.adapters import TokenExamples
from tasks.model_card import model_card
from tasks.rounds import ROUNDS_FILE, RoundRequest, round_figures
from tasks.tracking import MetricsLog, NoMetrics, read_metrics
from tasks.wiring.rounds import RoundExamples, round_examples
from tasks.wiring.stage_run import StageRun, default_device
from tasks.wiring.training import build_module, loss_spec

CHECKED_SAMPLES = 8  # whose log-probabilities are compared with the engine's, of a round


@dataclass(frozen=True, kw_only=True)
class _OpenRound:
    """A round that is scored: what it trains on, in which steps, and the teacher's states."""

    number: int
    examples: RoundExamples
    plan: TrainingPlan
    states: LiveStates | None


class TrainerHost:
    """Scores and trains rounds, and hands over weights, as every rank is asked to."""

    def __init__(self, stage: StageRun) -> None:
        run = stage.run
        assert run.on_policy is not None
        self._stage = stage
        self._config: OnPolicyConfig = run.on_policy
        self._steps = run.on_policy.steps(run.student.global_batch_size)
        self._device = default_device()
        tables = stage.tables()
        self._table = tables["train"]
        self._heldout_states, head = stage.teacher_signal(self._device)
        heads = {"teacher": head} if run.algorithm.TEACHER_STATES else {}
        self._module = build_module(stage, heads, self._device)
        self._trainer = Trainer(
            module=self._module,
            num_steps=self._steps * run.on_policy.rounds,
            seed=run.seed,
            config=run.student,
            checkpoints=stage.workdir / "checkpoints",
            reporter=stage.reporter,
            device=self._device,
        )
        self._head = head
        self._engine: TeacherEngine | None = self._teacher_engine()
        self._heldout = self._heldout_examples(TokenExamples(tables["heldout"]))
        self._offload = StudentOffload(self._module, self._trainer.optimizer, self._device)
        self._metrics: MetricsLog | NoMetrics = NoMetrics()
        if dist.get_rank() == 0:
            self._metrics = MetricsLog(
                run=run, folder=self._output, run_id=stage.digest, first_step=self._trainer.step
            )
        self._publisher = WeightPublisher(
            self._module.model,
            dtype=DTYPES[self._config.rollout.dtype],
            bucket_bytes=self._config.rollout.bucket_mb * 10**6,
            checkpoint_names=self._config.rollout.type == "sglang",
            lora_scale=self._lora_scale,
        )
        self._group: Any = None
        self._round: _OpenRound | None = None

    @property
    def _output(self) -> Path:
        return self._stage.workdir / "artifact"

    @property
    def _lora_scale(self) -> float:
        lora = self._stage.run.student.lora
        return lora.scale if lora else 1.0

    def progress(self) -> dict[str, Any]:
        """How many optimizer steps are done, and the size of the weights to hand over."""
        publisher = self._publisher
        return {
            "step": self._trainer.step,
            "buckets": publisher.num_buckets,
            "bytes": publisher.num_bytes,
        }

    # The round.

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """The teacher's states of all that the round trains on; they stay here."""
        self._round = self._opened(RoundRequest.model_validate(request))
        if self._round.states is not None:
            self._sleep_student()
            self._round.states.begin_step(0)
        examples = self._round.examples
        return {"examples": len(examples), "rows": int(examples.supervised_counts("student").sum())}

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """The round's optimizer steps, as far as they are not done; what came of them."""
        number = request["number"]
        done = self._stage.workdir / "rounds" / f"{number:06d}.json"
        stop = number * self._steps
        if self._trainer.step >= stop:
            if not is_whole(done):
                raise TrainingError(
                    f"the figures of round {number} in {done} are damaged; remove "
                    f"{self._stage.workdir}, and the run trains its rounds again"
                )
            result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            return result
        if self._trainer.step < stop - self._steps:
            raise TrainingError(
                f"round {number} begins at step {stop - self._steps}, and the student is at "
                f"{self._trainer.step}"
            )
        if self._round is None or self._round.number != number:
            self.score(request)  # a new process, where an old one had scored it
        assert self._round is not None
        opened = self._round
        self._offload.wake()
        started = time.perf_counter()
        before = self._measure_heldout() if self._trainer.step == 0 else None
        difference = self._check_samples(opened.examples.sampled)
        measured = time.perf_counter()
        self._trainer.run(
            stop,
            batches_of=opened.plan.step,
            examples=opened.examples,
            states=[] if opened.states is None else [opened.states],
            metrics=self._metrics,
            first=stop - self._steps,
            labels={"round": number},
        )
        trained = time.perf_counter()
        heldout = self._measure_heldout()
        measuring = time.perf_counter() - trained + measured - started
        seconds = {"train": trained - measured, "measure": measuring}
        self._round = None
        result = {
            "last_step": stop,
            **self._means(stop),
            "log_prob_difference": difference,
            "heldout_before": before,
            "heldout": heldout,
            "seconds": seconds,
        }
        if dist.get_rank() == 0:
            done.parent.mkdir(exist_ok=True)
            done.write_text(json.dumps(result), encoding="utf-8")
            seal(done)
        self._metrics.write_round(round_figures(result, self._rollout_info(request)), stop)
        saving = time.perf_counter()
        if number % self._config.checkpoint_rounds == 0 or number == self._config.rounds:
            self._trainer.save()  # once it is on the disk, the round counts as trained
        seconds["save"] = time.perf_counter() - saving
        return result

    def _rollout_info(self, request: dict[str, Any]) -> dict[str, Any]:
        rollouts = RoundRequest.model_validate(request).rollouts
        return self._stage.store.manifest(rollouts.kind, rollouts.digest).info

    def _opened(self, request: RoundRequest) -> _OpenRound:
        examples = round_examples(self._stage, self._table, request)
        student = self._stage.run.student
        plan = TrainingPlan(
            lengths=examples.lengths("student"),
            supervised_counts=examples.supervised_counts("student"),
            global_batch_size=student.global_batch_size,
            micro_batch_tokens=student.micro_batch_tokens,
            num_ranks=dist.get_world_size(),
            seed=(self._stage.run.seed << 20) + request.number,
            epochs=None,
            max_steps=self._steps,
        )
        states = self._live_states(examples, plan)
        return _OpenRound(number=request.number, examples=examples, plan=plan, states=states)

    def _live_states(self, examples: RoundExamples, plan: TrainingPlan) -> LiveStates | None:
        if self._engine is None:
            return None
        teacher, rank = self._stage.run.teacher, dist.get_rank()
        width = teacher.ranks_per_replica
        assert isinstance(teacher, InProcessTeacher)

        def sequences_of(step: int, of: int) -> list[TokenSequence]:
            return [
                examples[i].teacher for batch in plan.step(step).micro_batches[of] for i in batch
            ]

        first = rank // width * width
        return LiveStates(
            engine=self._engine,
            hidden_size=self._head.weight_VH.shape[1],
            sequences_of=sequences_of,
            rank=rank,
            ranks=range(first, first + width),
            num_steps=self._steps,
            steps_at_once=teacher.forward_batches or self._steps,
            sleep=teacher.sleep,
        )

    def _means(self, stop: int) -> dict[str, float]:
        """Loss and divergence over the steps of the round that ends with step `stop`."""
        if dist.get_rank() != 0:
            return {}
        records = read_metrics(self._output / "metrics.jsonl")
        mine = [r for r in records if stop - self._steps < r["step"] <= stop]
        return {name: float(np.mean([r[name] for r in mine])) for name in ("loss", "kd")}

    # Measuring.

    def _measure_heldout(self) -> dict[str, float] | None:
        if not self._heldout:
            return None
        judge, states = self._judge(), self._heldout_states
        return asdict(heldout_scores(self._measuring, judge, self._heldout, states))

    def _judge(self) -> Algorithm:
        """The reverse KL to the teacher whose held-out states are stored."""
        spec = replace(
            loss_spec(self._stage.run, self._module.head_part),
            divergence=ReverseKL(),
            kd_ratio=1.0,
            token_weight=None,
            policy_gradient=None,
        )
        head = self._module.part_of_head(self._head)
        ingredients = Ingredients(
            spec=spec,
            model=self._module.model,
            heads={"teacher": head},
            vocabulary_size=len(self._head.weight_VH),
        )
        return VanillaKD(VanillaKDConfig(), ingredients)

    def _check_samples(self, sampled: list[Example]) -> dict[str, float] | None:
        chosen = sampled[:CHECKED_SAMPLES]
        if not chosen or self._trainer.step % self._steps:
            return None  # mid-round, the weights are others than those that sampled
        spec = loss_spec(self._stage.run, self._module.head_part)
        difference = log_prob_difference(self._measuring, spec, self._config.temperature, chosen)
        return asdict(difference)

    @property
    def _measuring(self) -> Measuring:
        budget = self._stage.run.student.micro_batch_tokens
        return Measuring(module=self._module, micro_batch_tokens=budget, device=self._device)

    # The weights.

    def open_weights(self) -> None:
        """Get ready to hand them over."""
        self._offload.wake()

    def bucket(self, number: int) -> dict[str, Any] | None:
        """One bucket, in a file (rank 0's answer says which)."""
        bucket = self._publisher.write(number)
        return None if bucket is None else asdict(bucket)

    def describe_bucket(self, number: int) -> list[dict[str, Any]]:
        """What `send_bucket` will send."""
        return self._publisher.describe(number)

    def join_broadcast(self, address: str, port: int, ranks: int) -> None:
        """Meet the engine's ranks."""
        if dist.get_rank() == 0:
            from kdflow_core.sglang_runtime.engine import join_as_sender  # noqa: PLC0415 - 10 s

            self._group = join_as_sender(address, port, ranks, self._device)

    def send_bucket(self, number: int) -> None:
        """Send one bucket to the engine's ranks."""
        self._publisher.broadcast(number, self._group)

    def close_weights(self) -> None:
        """They are handed over."""
        self._sleep_student()

    # The end.

    def export(self, rounds: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The trained student as an artifact, with the records of its rounds; rank 0 answers with
        its reference.
        """
        stage, student = self._stage, self._stage.run.student
        self._offload.wake()
        self._trainer.wait()
        self._metrics.close()
        export_student(
            self._module,
            chat=stage.chat("student"),
            dtype=DTYPES[student.save_dtype],
            model_card=model_card(stage.spec),
            target=self._output / "model",
            lora=student.lora,
        )
        if dist.get_rank() != 0:
            return None
        lines = "".join(json.dumps(record) + "\n" for record in rounds)
        (self._output / ROUNDS_FILE).write_text(lines, encoding="utf-8")
        files = stage.store.publish(stage.kind, stage.digest, self._output)
        ref = stage.commit(
            files=files,
            counts={"steps": self._trainer.step, "rounds": self._config.rounds},
            info={"num_ranks": dist.get_world_size()},
        )
        shutil.rmtree(stage.workdir)  # the checkpoints have served
        return ref.model_dump(mode="json")

    def close(self) -> None:
        """What is saved is on the disk."""
        self._trainer.wait()

    # Parts of the beginning.

    def _teacher_engine(self) -> TeacherEngine | None:
        run = self._stage.run
        if not run.algorithm.TEACHER_STATES:
            return None
        folder = self._stage.model_folder("teacher")
        return build_engine(
            run.teacher,
            folder=folder,
            head=self._head,
            longest=min(run.data.max_length, context_length(folder)),
            device=self._device,
        )

    def _heldout_examples(self, examples: TokenExamples) -> list[Example]:
        count = min(self._config.heldout_sequences, len(examples))
        return [examples[int(i)] for i in np.linspace(0, len(examples) - 1, count)]

    def _sleep_student(self) -> None:
        if self._stage.run.student.sleep:
            self._offload.sleep()
