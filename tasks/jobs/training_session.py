"""The one training session: student, algorithm, trainer, metrics, held-out curve, and the export.

Off-policy training runs it once to its end, on-policy rounds run it round by round.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs.schema.teacher import InProcessTeacher
from kdflow_core.contracts import (
    Example,
    Examples,
    OutputHead,
    TeacherAtHand,
    TeacherEngine,
    TokenSequence,
)
from kdflow_core.loops.best import BestPoint, Point
from kdflow_core.loops.measure import HeldoutCurve, HeldoutScores, Measuring
from kdflow_core.loops.trainer import Trainer
from kdflow_core.models.loading import DTYPES
from kdflow_core.student.export import export_student
from kdflow_core.student.schedule import BatchSchedule
from kdflow_core.teacher import build_engine
from kdflow_core.teacher.live import LiveStates
from kdflow_core.workers.rank_side import is_asked_to_stop
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable
from tasks.jobs import aligning, chats, parts
from tasks.jobs.stage_run import StageRun
from tasks.jobs.stored import StoredStates, TokenExamples, evenly_spread
from tasks.jobs.student_module import build_comparison, build_module, division_of, loss_spec
from tasks.presentation.model_card import model_card
from tasks.presentation.tracking import HELDOUT_FILE, MetricsLog, NoMetrics, read_metrics
from tasks.stages.checkpoint_places import (
    FinalCheckpoint,
    checkpoints_folder,
    stored_copies,
)


class TrainingSession:
    """A student in training, on every rank; `teachers` are those that it learns from, by name.

    Metrics and the exported student are rank 0's. `judged_by` is the teacher whose stored held-out
    states the curve goes by.
    """

    def __init__(
        self,
        stage: StageRun,
        *,
        teachers: Mapping[str, TeacherAtHand[StoredStates]],
        num_steps: int,
        heldout: TokenTable,
        judged_by: TeacherAtHand[StoredStates] | None,
    ) -> None:
        run = stage.run
        self.stage = stage
        self.device = parts.device(stage)
        compares = bool(teachers) or judged_by is not None
        pair, by = aligning.pair(stage) if compares else None, run.loss.compared_by
        self.folding = build_comparison(pair, by, self.device)
        others = {name: own.view for name, own in teachers.items() if own.view != "teacher"}
        self.module = build_module(
            stage,
            {name: own.head for name, own in teachers.items()},
            self.folding,
            self.device,
            views=others,
            foldings={
                name: build_comparison(aligning.pair(stage.of_teacher(name), view), by, self.device)
                for name, view in others.items()
            },
            pair=pair,
        )
        self._copies = stored_copies(stage.spec)
        self.trainer = Trainer(
            module=self.module,
            num_steps=num_steps,
            seed=run.seed,
            config=run.student,
            checkpoints=checkpoints_folder(stage.store, stage.spec.identity),
            reporter=stage.reporter,
            device=self.device,
            is_asked_to_stop=is_asked_to_stop,
            copies=self._copies,
        )
        self.division = division_of(stage)
        self.measuring = Measuring(module=self.module, division=self.division, device=self.device)
        self.curve = None if judged_by is None else self._curve(heldout, judged_by)
        self.metrics: MetricsLog | NoMetrics = NoMetrics()
        if dist.get_rank() == 0:
            self.metrics = MetricsLog(
                run=run,
                folder=self.output,
                run_id=stage.digest,
                first_step=self.trainer.step,
                tell=stage.reporter.message,
            )
        self.best = None if run.eval.keep_best is None else BestPoint(run.eval.patience)
        if self.best is not None and run.on_policy is None:
            is_first = dist.get_rank() == 0
            self.restore_best(read_metrics(self.output / HELDOUT_FILE) if is_first else [])

    @property
    def output(self) -> Path:
        """Where the artifact's files are collected."""
        return self.stage.workdir / "artifact"

    def measure_heldout(self) -> HeldoutScores | None:
        """The held-out scores of the student as it is; None where there is nothing to measure."""
        return None if self.curve is None else self.curve.scores()

    def write_heldout(self) -> None:
        """A point of the held-out curve; the student there is saved if it is the best so far."""
        scores, step = self.measure_heldout(), self.trainer.step
        if scores is None:
            return
        self.metrics.write_heldout(asdict(scores), step)
        if step > 0:
            self.hold_if_best(asdict(scores))

    def hold_if_best(self, scores: Mapping[str, Any]) -> None:
        """Save the student as it is, for as long as no other has better scores."""
        if self.best is not None and self.best.add(self._point(scores, self.trainer.step)):
            self.trainer.save(hold=True)

    def restore_best(self, scores: Sequence[Mapping[str, Any]]) -> None:
        """Go on behind earlier scores, as rank 0 has them, each with its `step`."""
        found = [list(scores)]
        dist.broadcast_object_list(found)
        points = [self._point(own, own["step"]) for own in found[0] if own["step"]]
        if self.best is None or not points:
            return
        self.best.restore(points, self.trainer.saved_steps())
        if self.best.best is not None:
            self.trainer.hold(self.best.best.step)

    @property
    def is_enough(self) -> bool:
        """Whether the held-out curve says that training need not go on."""
        return self.best is not None and self.best.is_enough

    def _point(self, scores: Mapping[str, Any], step: int) -> Point:
        return Point(step=step, value=float(scores[str(self.stage.run.eval.keep_best)]))

    def _take_the_best(self) -> None:
        """Have the weights of the best point of the curve."""
        if self.best is None or self.best.best is None or self.best.best.step == self.trainer.step:
            return
        best = self.best.best
        self.trainer.go_back_to(best.step)
        self.stage.reporter.message(
            f"the result is the student of step {best.step}, where the held-out "
            f"{self.stage.run.eval.keep_best} was least: {best.value:.4f} nats"
        )

    def finish(
        self, counts: Mapping[str, int], files: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> ArtifactRef | None:
        """Export the student with its metrics and some `files` of JSON lines, as the stage's
        artifact. Collective; rank 0 returns the reference.
        """
        stage, config = self.stage, self.stage.run.student
        self.trainer.wait()
        self._take_the_best()
        self.metrics.close()
        export_student(
            self.module,
            chat=chats.chat(stage, "student"),
            dtype=DTYPES[config.save_dtype],
            model_card=model_card(stage.spec),
            target=self.output / "model",
            lora=config.lora,
        )
        if dist.get_rank() != 0:
            return None
        for name, records in files.items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (self.output / name).write_text(lines, encoding="utf-8")
        if config.keep_final:  # first: a student that is there has it
            final = FinalCheckpoint(stage.store, f"{stage.kind}/{stage.digest}")
            final.keep(checkpoints_folder(stage.store, stage.spec.identity))
        published = stage.store.publish(stage.kind, stage.digest, self.output)
        info: dict[str, Any] = {
            "num_ranks": dist.get_world_size(),
            "final_checkpoint": config.keep_final,
        }
        if self.best is not None and self.best.best is not None:
            info["kept_step"] = self.best.best.step
        ref = stage.commit(files=published, counts=counts, info=info)
        shutil.rmtree(stage.workdir)  # the checkpoints have served
        copies = None if config.keep_final else self._copies
        if copies is not None and (problem := copies.remove()) is not None:
            stage.reporter.message(f"the copies of its checkpoints stay: {problem}")
        return ref

    def _curve(self, table: TokenTable, judge: TeacherAtHand[StoredStates]) -> HeldoutCurve | None:
        chosen = self._heldout_examples(TokenExamples(table))
        if not chosen:
            return None
        return HeldoutCurve(
            self.measuring,
            spec=loss_spec(self.stage.run, self.module.head_part, self.folding),
            head=judge.head,
            states=judge.signals,
            examples=chosen,
        )

    def _heldout_examples(self, examples: TokenExamples) -> list[Example]:
        """Evenly spread over those that the run's own teacher has states of."""
        run = self.stage.run
        known = examples.of_sources(run.sources_of("teacher"))
        return [examples[i] for i in evenly_spread(known, run.heldout_sequences)]


def teacher_engine(stage: StageRun, head: OutputHead, longest: int) -> TeacherEngine:
    """The teacher inside these ranks."""
    return build_engine(
        stage.run.teacher,
        folder=stage.model_folder("teacher"),
        head=head,
        longest=longest,
        device=parts.device(stage),
    )


def teacher_sequences(
    schedule: BatchSchedule,
    examples: Examples,
    step: int,
    rank: int,
    sources: frozenset[str] | None = None,
    view: str = "teacher",
) -> list[TokenSequence]:
    """What a teacher of some data sources (None: of all) saw of a rank's part of a step, in its
    view.
    """
    batches = schedule.step(step).micro_batches[rank]
    chosen = [examples[i] for batch in batches for i in batch]
    return [e.views[view] for e in chosen if sources is None or e.source in sources]


def live_states(
    stage: StageRun,
    *,
    engine: TeacherEngine,
    head: OutputHead,
    sequences_of: Callable[[int, int], Sequence[TokenSequence]],
    num_steps: int,
    steps_at_once: int,
) -> LiveStates:
    """The states of an engine in these ranks, `steps_at_once` steps at a time.

    `sequences_of(step, rank)` are a rank's teacher sequences.
    """
    teacher, rank = stage.run.teacher, dist.get_rank()
    assert isinstance(teacher, InProcessTeacher)  # RunConfig refuses others
    width = teacher.ranks_per_replica
    first = rank // width * width
    return LiveStates(
        engine=engine,
        hidden_size=head.weight_VH.shape[1],
        sequences_of=sequences_of,
        rank=rank,
        ranks=range(first, first + width),
        num_steps=num_steps,
        steps_at_once=steps_at_once,
        sleep=teacher.sleep,
    )
