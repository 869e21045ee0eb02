"""The job that trains the student off-policy."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch.distributed as dist

from configs.schema.teacher import InProcessTeacher
from kdflow_core.contracts import OutputHead, TeacherAtHand
from kdflow_core.errors import TrainingError
from kdflow_core.student.prefetch import PrefetchedStates
from kdflow_core.student.schedule import BatchSchedule
from kdflow_core.teacher.live import LiveStates
from kdflow_core.workers.rank_side import stoppable
from storage.artifact import ArtifactRef
from storage.log_probs import LogProbs
from storage.tokens import TokenTable
from tasks.forecast.memory import least_host_memory, least_training, told
from tasks.jobs import parts
from tasks.jobs.stage_run import StageRun, job
from tasks.jobs.stored import LOG_PROBS_FILE, StoredLogProbs, StoredStates, TokenExamples
from tasks.jobs.student_module import division_of
from tasks.jobs.training_session import (
    TrainingSession,
    live_states,
    teacher_engine,
    teacher_sequences,
)

States = PrefetchedStates | LiveStates | StoredLogProbs


@job("train")
def train_student(stage: StageRun) -> ArtifactRef | None:
    """Distill; every rank runs this, rank 0 returns the artifact's reference."""
    parts.join(stage)
    tables = stage.tables()
    table = tables["train"]
    teachers = _stored_teachers(stage, table)
    _tell_memory(stage)
    schedule, states = _schedule_and_states(stage, table, teachers)
    session = TrainingSession(
        stage,
        teachers=teachers if stage.run.trains_on_states else {},
        num_steps=schedule.num_steps,
        heldout=tables["heldout"],
        judged_by=teachers["teacher"] if stage.run.measures_heldout else None,
    )
    before = _before(stage)
    if session.trainer.step < before["steps"]:
        raise TrainingError(
            "the checkpoints of this training are gone or damaged, also the one that it began "
            f"with; remove {stage.workdir}, and that one is fetched again"
        )
    _train(session, schedule, table, states)
    for source in states:
        source.close()
    own = range(before["steps"], session.trainer.step)
    tokens = int(sum(schedule.lengths[schedule.sequences(step)].sum() for step in own))
    counts = {"steps": session.trainer.step, "tokens": before["tokens"] + tokens}
    return session.finish(counts, files={})


def _before(stage: StageRun) -> Mapping[str, int]:
    """Steps and tokens of the training that goes on here."""
    name = stage.run.student.continues
    ref = None if name is None else stage.store.find_named(name)
    return {"steps": 0, "tokens": 0} if ref is None else ref.counts


def _tell_memory(stage: StageRun) -> None:
    if stage.context.rank == 0:
        beside = stage.model_folder("teacher") if stage.run.delivery == "live" else None
        run, folder = stage.run, stage.model_folder("student")
        on_gpu = parts.device(stage).type == "cuda"
        held = told(least_training(run, folder, beside, on_gpu=on_gpu))
        apart = (
            f", and {told(least_host_memory(run.student, folder))} in the host's memory"
            if run.student.offload and on_gpu
            else ""
        )
        stage.reporter.message(f"each rank holds {held}{apart}; activations come on top")


def _stored_teachers(stage: StageRun, table: TokenTable) -> dict[str, TeacherAtHand[StoredStates]]:
    """The teachers that training asks by name, or measures against."""
    run = stage.run
    if not run.trains_on_states and not run.measures_heldout:
        return {}
    return {
        name: parts.stored_teacher(stage.of_teacher(name), parts.view_of(table, name))
        for name in run.teacher_names
    }


def _train(
    session: TrainingSession, schedule: BatchSchedule, table: TokenTable, states: Sequence[States]
) -> None:
    trainer, every = session.trainer, session.stage.run.eval.every_steps
    if trainer.step == 0:
        session.write_heldout()

    def after_step(step: int) -> bool:
        if every is not None and (step % every == 0 or step == schedule.num_steps):
            session.write_heldout()
        return session.is_enough

    if trainer.step < schedule.num_steps and not session.is_enough:
        with stoppable():
            trainer.run(
                schedule.num_steps,
                batches_of=schedule.step,
                examples=TokenExamples(table),
                states=states,
                metrics=session.metrics,
                after_step=after_step,
            )
        trainer.save()


def _schedule_and_states(
    stage: StageRun, table: TokenTable, teachers: Mapping[str, TeacherAtHand[StoredStates]]
) -> tuple[BatchSchedule, Sequence[States]]:
    """The steps, and the states of every teacher that is asked: stored ones, or those of an engine
    in these ranks.
    """
    run = stage.run
    if not run.algorithm.reads_signals:
        return batch_schedule(stage, table, groups=None), ()
    if run.stores_log_probs:
        found = stage.store.local_copy(stage.spec.inputs["log_probs"]) / LOG_PROBS_FILE
        return batch_schedule(stage, table, groups=None), (StoredLogProbs(LogProbs(found)),)
    if run.delivery == "live":
        schedule = batch_schedule(stage, table, groups=None)
        return schedule, (_live(stage, table, schedule, teachers["teacher"].head),)
    windowed = run.student.shuffle_window_shards is not None
    first = next(iter(teachers.values()))
    groups = first.signals.shard_of(table.digests(first.view)) if windowed else None
    schedule = batch_schedule(stage, table, groups=groups)
    examples = TokenExamples(table)
    return schedule, [
        _prefetched(teacher, schedule, examples, run.sources_of(name))
        for name, teacher in teachers.items()
    ]


def _prefetched(
    teacher: TeacherAtHand[StoredStates],
    schedule: BatchSchedule,
    examples: TokenExamples,
    sources: frozenset[str] | None,
) -> PrefetchedStates:
    rank = dist.get_rank()
    return PrefetchedStates(
        teacher.signals,
        sequences_of=lambda step: teacher_sequences(
            schedule, examples, step, rank, sources, teacher.view
        ),
        num_steps=schedule.num_steps,
    )


def _live(
    stage: StageRun, table: TokenTable, schedule: BatchSchedule, head: OutputHead
) -> LiveStates:
    """A teacher in these ranks."""
    teacher = stage.run.teacher
    assert isinstance(teacher, InProcessTeacher)  # RunConfig refuses others for a live run
    examples = TokenExamples(table)
    return live_states(
        stage,
        engine=teacher_engine(stage, head, int(table.lengths("teacher").max())),
        head=head,
        sequences_of=lambda step, rank: teacher_sequences(schedule, examples, step, rank),
        num_steps=schedule.num_steps,
        steps_at_once=teacher.forward_batches or 1,
    )


def batch_schedule(stage: StageRun, table: TokenTable, groups: np.ndarray | None) -> BatchSchedule:
    """The steps of the run; `groups` are the shards of the sequences' stored states."""
    config = stage.run.student
    return BatchSchedule(
        lengths=table.lengths("student"),
        supervised_counts=table.supervised_counts("student"),
        global_batch_size=config.global_batch_size,
        division=division_of(stage),
        num_ranks=dist.get_world_size(),
        seed=stage.run.seed,
        epochs=config.epochs,
        max_steps=config.max_steps,
        groups=groups,
        window=config.shuffle_window_shards,
    )
