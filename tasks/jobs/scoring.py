"""The stage that keeps of the teacher only how probable it finds the samples' own tokens.

4 bytes a token in place of a row of states, for losses that need no more. Replicas of the teacher
share the sequences by parts; a part is written once, whole, so that a stage that is run again goes
on with the missing ones. Dimensions: S sequences, N tokens, H hidden size.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kdflow_core.contracts import OutputHead
from kdflow_core.losses.span_likelihood import surprisals
from kdflow_core.models.heads import head_digest
from kdflow_core.teacher import longest_allowed
from kdflow_core.teacher.streaming import check_lengths
from kdflow_core.workers.devices import barrier
from storage.artifact import ArtifactRef
from storage.log_probs import write_log_probs
from storage.sealed import is_whole, seal
from tasks.jobs import parts
from tasks.jobs.earlier_states import earlier_states
from tasks.jobs.stage_run import StageRun, job
from tasks.jobs.stored import LOG_PROBS_FILE, bfloat16_tensor
from tasks.jobs.teacher_pass import (
    WINDOW_BATCHES,
    TeacherWork,
    distinct_sequences,
    engine_for,
    rows_of,
    share_of,
)

PART_SEQUENCES = 512


@job("score-tokens")
def score_tokens(stage: StageRun) -> ArtifactRef | None:
    """The log-probabilities of the training split's tokens; every rank runs this, rank 0 returns
    the artifact's reference.
    """
    parts.join(stage)
    rank, _ = parts.rank_and_size()
    work = distinct_sequences([stage.tables()["train"]])
    folder = stage.workdir / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    count = len(work.sequences)
    portions = [range(k, min(k + PART_SEQUENCES, count)) for k in range(0, count, PART_SEQUENCES)]
    paths = [folder / f"{number:06d}.npy" for number in range(len(portions))]
    missing = [k for k, path in enumerate(paths) if not is_whole(path)]
    barrier()  # every rank has seen the same parts before one of them writes
    if missing:
        _run_teacher(stage, work, [(portions[k], paths[k]) for k in missing])
    barrier()
    if rank != 0:
        return None
    log_prob_M = np.concatenate([np.load(path) for path in paths])
    target = stage.workdir / "artifact"
    target.mkdir(exist_ok=True)
    sequences = work.sequences
    write_log_probs(target / LOG_PROBS_FILE, sequences.digests, sequences.num_rows, log_prob_M)
    files = stage.store.publish(stage.kind, stage.digest, target)
    counts = {"sequences": count, "tokens": int(work.lengths.sum()), "rows": len(log_prob_M)}
    ref = stage.commit(files=files, counts=counts, info={})
    shutil.rmtree(stage.workdir)  # the parts have served
    return ref


def _run_teacher(stage: StageRun, work: TeacherWork, missing: Sequence[tuple[range, Path]]) -> None:
    """Have the parts that are missing written, by the first rank of each replica."""
    teacher, device = stage.run.teacher, parts.device(stage)
    folder = stage.model_folder("teacher")
    check_lengths(int(work.lengths.max()), longest_allowed(teacher, folder))
    rank, _ = parts.rank_and_size()
    head = parts.teacher_head(stage, torch.device("cpu"))
    heads_digest = head_digest(head) if rank == 0 else ""  # of gigabytes, asked for by the first
    earlier = earlier_states(stage, heads_digest, work.sequences.digests)
    wanted = [number for portion, _ in missing for number in portion]
    held = int(earlier.held_N[wanted].sum())
    if rank == 0 and held:
        stage.reporter.message(
            f"{held} of {len(wanted)} sequences are not read again: their states are stored"
        )
    engine = engine_for(stage, head, work, earlier, wanted, wanted)
    if device.type != "cpu":
        head = parts.teacher_head(stage, device)
    mine, writes = share_of(stage, missing)
    total = int(sum(work.lengths[portion].sum() for portion, _ in mine))
    done = 0
    for portion, path in mine:
        numbers = [n for n in portion if writes or not earlier.held_N[n]]
        window = WINDOW_BATCHES * teacher.tokens_per_batch
        found: list[np.ndarray] = []
        for number, (rows_NH, targets_N) in zip(
            numbers, rows_of(engine, earlier, work, numbers, window), strict=True
        ):
            if writes:
                found.append(_log_probs(stage, head, rows_NH, targets_N))
                done += int(work.lengths[number])
                stage.reporter.progress(done=done, total=total, unit="tokens")
        if writes:
            _write(path, np.concatenate([np.zeros(0, np.float32), *found]))
    if engine is not None:
        engine.close()


def _log_probs(
    stage: StageRun, head: OutputHead, rows_NH: np.ndarray, targets_N: np.ndarray
) -> np.ndarray:
    """Of a sequence's tokens, from the rows of its states in bits of bfloat16: float32 [N]."""
    device = head.weight_VH.device
    nats_N = surprisals(
        bfloat16_tensor(rows_NH).to(device),
        head,
        torch.from_numpy(targets_N).to(device),
        stage.run.loss.logits_memory_mb * 10**6,
    )
    return -nats_N.float().cpu().numpy()


def _write(path: Path, log_prob_N: np.ndarray) -> None:
    """One part; under another name until it is whole."""
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, log_prob_N)
    os.replace(temporary, path)
    seal(path)
