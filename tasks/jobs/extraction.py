"""The stage that runs the teacher.

Ranks share the work by whole shards: each replica of the teacher takes its share of the missing
ones, and the replica's first rank writes them. What the same teacher has read for other runs is
copied from there.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from kdflow_core.bounded import BoundedWorker
from kdflow_core.contracts import OutputHead
from kdflow_core.models.heads import head_digest
from kdflow_core.models.loading import load_config
from kdflow_core.teacher import longest_allowed
from kdflow_core.teacher.codec_loss import codec_loss, compare_states
from kdflow_core.teacher.streaming import check_lengths
from kdflow_core.workers.devices import barrier
from storage.artifact import ArtifactRef
from storage.states.layout import Layout, plan_layout
from storage.states.writer import HiddenStateWriter
from tasks.jobs import parts
from tasks.jobs.earlier_states import EarlierStates, borrowed_states, earlier_states
from tasks.jobs.stage_run import StageRun, job
from tasks.jobs.stored import bfloat16_tensor
from tasks.jobs.teacher_pass import (
    WINDOW_BATCHES,
    TeacherWork,
    distinct_sequences,
    engine_for,
    rows_of,
    share_of,
)
from tasks.stages.slices import state_splits

SHARDS_BEHIND = 2


@job("extract")
def extract_states(stage: StageRun) -> ArtifactRef | None:
    """Run the teacher once over all sequences and stream its hidden states into the store.

    Every rank runs this, rank 0 returns the artifact's reference. Of a portion, only every
    `portion.of`-th shard is written.
    """
    parts.join(stage)
    rank, _ = parts.rank_and_size()
    tables = stage.tables()
    splits = [tables[split] for split in state_splits(stage.run)]
    of = stage.spec.identity.config
    work = distinct_sequences(splits, of.get("sources"), of.get("view", "teacher"))
    folder = stage.model_folder("teacher")
    check_lengths(int(work.lengths.max()), longest_allowed(stage.run.teacher, folder))
    head = parts.teacher_head(stage, torch.device("cpu"))
    heads_digest = head_digest(head) if rank == 0 else ""  # of gigabytes, asked for by the first
    storage = stage.run.storage
    layout = plan_layout(
        hidden_size=head.weight_VH.shape[1],
        num_rows=work.sequences.num_rows,
        shard_rows=storage.shard_rows,
        chunk_rows=storage.chunk_rows,
        codec=storage.codec,
    )
    writer = HiddenStateWriter(
        store=stage.store,
        kind=stage.kind,
        digest=stage.digest,
        layout=layout,
        sequences=work.sequences,
        borrowed=borrowed_states(stage, heads_digest, layout, work.sequences),
    )
    layout = writer.layout
    taken = writer.borrow() if rank == 0 else 0
    barrier()
    missing = writer.missing_shards()
    barrier()  # every rank has seen the same shards before one of them writes
    if len(missing) < layout.num_shards:
        stage.reporter.message(
            f"{layout.num_shards - len(missing)} of {layout.num_shards} shards are there already"
            + (f", {taken} of them taken over from other runs of this teacher" if taken else "")
        )
    if rank == 0 and storage.check_room:
        _require_room(stage, layout, writer.rows_of(missing))
    portion = stage.spec.portion
    if portion is not None:
        missing = [k for k in missing if k % portion.of == portion.number]
    if missing:
        earlier = earlier_states(stage, heads_digest, work.sequences.digests)
        _run_teacher(stage, head, work, writer, missing, earlier)
    barrier()
    if rank != 0 or portion is not None:
        return None
    files, measured = writer.close()
    info = _info(stage, head, heads_digest, layout)
    if measured:
        info["codec_loss"] = codec_loss(measured)
        _tell_loss(stage, info["codec_loss"])
    return stage.commit(
        files=files,
        counts={
            "sequences": len(work.sequences),
            "tokens": int(work.lengths.sum()),
            "rows": layout.num_rows,
        },
        info=info,
    )


def _require_room(stage: StageRun, layout: Layout, missing_rows: int) -> None:
    """Refuse what will not fit the disk, before the teacher runs. Raises StoreFullError."""
    what = f"the missing part of the teacher's {layout.num_rows:,} hidden states"
    stage.store.require_room(replace(layout, num_rows=missing_rows).num_bytes, what)


def _tell_loss(stage: StageRun, loss: dict[str, float]) -> None:
    stage.reporter.message(
        f"codec {stage.run.storage.codec}: KL of stored from exact distributions "
        f"{loss['kl_mean']:.1e} nats on average, {loss['kl_max']:.1e} at most, same top-1 "
        f"{loss['same_top1']:.1%} ({loss['rows']:.0f} rows compared)"
    )


def _info(stage: StageRun, head: OutputHead, heads_digest: str, layout: Layout) -> dict[str, Any]:
    """What a reader of the states must check or wants to know."""
    folder, trust = stage.model_folder("teacher"), stage.trusts("teacher")
    config = load_config(folder, trust_remote_code=trust)
    tokens = stage.spec.inputs["tokens"]
    tokenized = stage.store.manifest(tokens.kind, tokens.digest)
    return {
        "layout": asdict(layout),
        "teacher": {
            "model": stage.run.teacher.model.model_dump(mode="json"),
            "digest": stage.spec.identity.inputs["teacher_model"],
            "tokenizer": tokenized.inputs["teacher_tokenizer"],
            "template": tokenized.config["teacher_template"],
        },
        "architecture": (config.architectures or ["unknown"])[0],
        "engine": stage.run.teacher.type,
        "dtype": stage.run.teacher.dtype,
        "final_norm_applied": True,
        "head": {
            "digest": heads_digest,
            "vocabulary": head.weight_VH.shape[0],
            "bias": head.bias_V is not None,
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
        },
        "meaning": "row i predicts token i+1",
    }


def _run_teacher(
    stage: StageRun,
    head: OutputHead,
    work: TeacherWork,
    writer: HiddenStateWriter,
    missing: list[int],
    earlier: EarlierStates,
) -> None:
    rank, _ = parts.rank_and_size()
    shards, writes = share_of(stage, missing)
    wanted = [number for shard in missing for number in writer.sequences_of(shard)]
    held = int(earlier.held_N[wanted].sum())
    if rank == 0 and held:
        stage.reporter.message(
            f"the states of {held} of {len(wanted)} sequences are copied: this teacher has read "
            "them for other runs"
        )
    first = list(writer.sequences_of(missing[0]))
    engine = engine_for(stage, head, work, earlier, wanted, first)
    numbers = [number for shard in shards for number in writer.sequences_of(shard)]
    total, done = int(work.lengths[numbers].sum()), 0

    def measure(exact_NH: np.ndarray, stored_NH: np.ndarray) -> dict[str, float]:
        return compare_states(head, bfloat16_tensor(exact_NH), bfloat16_tensor(stored_NH))

    window, started = WINDOW_BATCHES * stage.run.teacher.tokens_per_batch, time.perf_counter()
    with BoundedWorker(SHARDS_BEHIND) as background:
        for shard in shards:
            # A shard has batches of its own: what they are does not depend on which shards were
            # there already, nor on who computes the others, and states of a batch depend on it.
            rows: list[np.ndarray] = []
            targets: list[np.ndarray] = []
            sequences: Sequence[int] = writer.sequences_of(shard)
            if not writes:  # what is copied is the writer's
                sequences = [number for number in sequences if not earlier.held_N[number]]
            made = rows_of(engine, earlier, work, sequences, window)
            for number, (rows_NH, targets_N) in zip(sequences, made, strict=True):
                rows.append(rows_NH)
                targets.append(targets_N)
                done += int(work.lengths[number])
                if writes:
                    passed = time.perf_counter() - started
                    figures = {"queue": background.behind, "waiting": background.waited_s / passed}
                    stage.reporter.progress(done=done, total=total, unit="tokens", figures=figures)
            if writes:
                background.submit(partial(writer.write_shard, shard, rows, targets, measure))
    if engine is not None:
        engine.close()
