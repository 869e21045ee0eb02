"""The stage that probes: how fast teacher and student are here, how small states become."""

import numpy as np
import torch
import torch.distributed as dist

from kdflow_core.contracts import OutputHead, TokenSequence
from kdflow_core.loops.probe import TeacherProbe, probe_teacher, probe_training
from kdflow_core.student.schedule import BatchSchedule
from kdflow_core.teacher import build_engine
from kdflow_core.teacher.codec_loss import codec_loss, compare_states
from storage.artifact import ArtifactRef
from storage.codecs import CODECS
from storage.states.sizes import stored_sample
from storage.tokens import TokenTable
from tasks.forecast.estimate import ESTIMATE_FILE, Estimate
from tasks.jobs import aligning, parts
from tasks.jobs.stage_run import StageRun, job
from tasks.jobs.stored import TokenExamples, bfloat16_bits, bfloat16_tensor
from tasks.jobs.student_module import build_comparison, build_module
from tasks.jobs.teacher_pass import TeacherWork, distinct_sequences
from tasks.jobs.training import batch_schedule

PROBED_BATCHES = 3
SAMPLE_ROWS = 1024


@job("estimate")
def estimate_run(stage: StageRun) -> ArtifactRef | None:
    """Probe teacher and training; every rank runs this, rank 0 returns the reference."""
    parts.join(stage)
    device = parts.device(stage)
    tables = stage.tables()
    train = tables["train"]
    work = distinct_sequences(list(tables.values()))
    schedule = batch_schedule(stage, train, groups=None)
    heads = {n: parts.teacher_head(stage.of_teacher(n), device) for n in stage.run.teacher_names}
    others = "" if len(heads) == 1 else ": the run's own, not the others"
    stage.reporter.message(f"probing the teacher{others}")
    teacher, teacher_peak = _probe_teacher(stage, work, heads["teacher"])
    stage.reporter.message("probing the student's training")
    comparison = build_comparison(aligning.pair(stage), stage.run.loss.compared_by, device)
    _reset_peak(device)
    student_rate = probe_training(
        module=build_module(stage, heads, comparison, device),
        schedule=schedule,
        examples=TokenExamples(train),
        config=stage.run.student,
        rank=dist.get_rank(),
        device=device,
    )
    if dist.get_rank() != 0:
        return None
    row_bytes, int8_kl = _codecs(heads["teacher"], teacher.states_NH)
    heldout = int(tables["heldout"].lengths("teacher").sum())
    estimate = Estimate(
        sequences=len(work.sequences),
        replay_tokens=int(work.lengths.sum()),
        live_tokens=_trained_tokens(schedule, train, "teacher") + heldout,
        rows=int(work.sequences.num_rows.sum()),
        student_tokens=_trained_tokens(schedule, train, "student"),
        steps=schedule.num_steps,
        teacher_rate=teacher.tokens_per_s,
        student_rate=student_rate,
        row_bytes=row_bytes,
        int8_kl=int8_kl,
        device_bytes=_device_bytes(device),
        teacher_peak_bytes=teacher_peak,
        student_peak_bytes=_peak_bytes(device),
    )
    path = stage.workdir / ESTIMATE_FILE
    path.write_text(estimate.model_dump_json(indent=1), encoding="utf-8")
    return stage.publish(counts={"sequences": estimate.sequences}, info={})


def _probe_teacher(
    stage: StageRun, work: TeacherWork, head: OutputHead
) -> tuple[TeacherProbe, int | None]:
    """The teacher's rate and its peak memory in bytes; it is gone afterwards."""
    device = parts.device(stage)
    _reset_peak(device)
    engine = build_engine(
        stage.run.teacher,
        folder=stage.model_folder("teacher"),
        head=head,
        longest=int(work.lengths.max()),
        device=device,
    )
    wanted = PROBED_BATCHES * stage.run.teacher.tokens_per_batch
    count = int(np.searchsorted(np.cumsum(work.lengths), wanted)) + 1
    numbers = range(min(count, len(work.lengths)))
    sequences: list[TokenSequence] = list(work.of(numbers))
    probe = probe_teacher(engine, sequences)
    peak = _peak_bytes(device)
    engine.close()
    return probe, peak


def _trained_tokens(schedule: BatchSchedule, table: TokenTable, side: str) -> int:
    """Tokens of one side over all steps."""
    lengths = table.lengths(side)
    epochs, rest = divmod(schedule.num_steps, schedule.steps_per_epoch)
    partial = sum(int(lengths[schedule.sequences(k)].sum()) for k in range(rest))
    return epochs * int(lengths.sum()) + partial


def _codecs(head: OutputHead, states_NH: torch.Tensor) -> tuple[dict[str, float], float]:
    """Bytes per row by codec, and what int8 changes, on a sample of states."""
    sample_NH = states_NH[:SAMPLE_ROWS]
    bits_NH = bfloat16_bits(sample_NH)
    row_bytes, rows = {}, {}
    for name in CODECS:
        row_bytes[name], rows[name] = stored_sample(bits_NH, name)
    compared = compare_states(head, sample_NH[:64], bfloat16_tensor(rows["int8"][:64]))
    return row_bytes, codec_loss([compared])["kl_mean"]


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes(device: torch.device) -> int | None:
    return int(torch.cuda.max_memory_reserved()) if device.type == "cuda" else None


def _device_bytes(device: torch.device) -> int | None:
    return int(torch.cuda.mem_get_info()[1]) if device.type == "cuda" else None
